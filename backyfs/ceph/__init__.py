"""RBD images of a Ceph cluster through librbd: where they are, how to open them, how they fail.

Used by the source that backs images up and by the target that restores them.
"""
