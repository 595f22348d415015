"""Restoring: the bytes of a stored image go to a file, a block device or a stream."""
