"""The NBD protocol without input or output: bytes in, events out.

`handshake` is the phase of options, `transmission` that of requests, `constants` the numbers of the
specification. Fixed newstyle only; nothing here knows sockets, threads, exports or files.
"""
