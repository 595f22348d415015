"""backyfs: block-level backups of virtual machine disks, shown as a tree of files."""

__version__ = "0.1.0"
