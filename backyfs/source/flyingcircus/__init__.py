"""RBD images whose snapshots the hypervisor takes, while the guest's file systems are frozen.

    FlyingCircusSource (source.py)  images as of `ceph-rbd`, with another way to take snapshots
      SnapshotRequest (request.py)  asks the hypervisor through Consul, and waits
        Consul (consul.py)          Consul's key-value store over HTTP
        Agent (agent.py)            its address and token

The protocol is Backy's and fc.qemu's, so that either may be replaced by itself.
"""
