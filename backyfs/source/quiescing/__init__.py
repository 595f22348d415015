"""Makes a guest hold still while its snapshots are taken, and thaws it whatever happens.

    QuiescedSource (quiesced.py)      wraps any source: freeze, snapshot all disks, thaw; the policy
      Freeze (freeze.py)              the backup's side: starts the guard, asks it, replaces it
        guard.py                      a process of its own: freezes, waits, thaws; outlives us
          Steps (steps.py)            the quiescers of a job: commands around the guest agent
            GuestAgent (agent.py)     QEMU's guest agent on its unix socket
            Commands (commands.py)    the operator's own programs
    Note (note.py)                    says on disk that a guest may be frozen, until it is thawed
    thaw_leftover (leftover.py)       thaws what a crash of everything left frozen

The guard alone talks to the guest: it freezes, and it thaws when it is asked to, when the time is
up, when it gets SIGTERM, and when the backup ends without a word, for the kernel closes its pipe.
If the guard dies or hangs, the backup thaws; if both die, the note is left, and the next backup
(or the scheduler, at once) thaws. Between freeze and thaw the guard touches no file.

Invariants: whatever was begun to be frozen is thawed, also when freezing failed or was not
answered; nothing waits without a limit; a consistency is raised only if the guest was still
frozen when the last snapshot was complete.
"""
