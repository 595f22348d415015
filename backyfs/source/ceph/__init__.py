"""Source `ceph-rbd`: disks that are RBD images, backed up from snapshots that nobody can change.

A backup takes a snapshot of every image and keeps it, so that the next one can ask Ceph what has
changed since. Once that is published the older snapshot goes.
"""
