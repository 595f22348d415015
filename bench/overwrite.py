"""Write the changed extents of one image into another: overwrite.py FROM TO CHANGES.

The second half of the `cp --reflink` floor. It needs no more than the standard library, so that
its process starts as fast as Python can.
"""

import json
import os
import sys


def main() -> None:
    source, target = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_WRONLY)
    with open(sys.argv[3], "rb") as changes:
        for extent in json.load(changes):
            os.pwrite(
                target, os.pread(source, extent["length"], extent["offset"]), extent["offset"]
            )


if __name__ == "__main__":
    main()
