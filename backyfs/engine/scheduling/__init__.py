"""The scheduler: decides when which job runs, starts ordinary commands, and notes how they end.

- `planning`, `backoff`, `history`: pure; times are arguments.
- `pools`: who may run now. `world`: what the scheduler needs of the world, as a protocol.
- `jobs`, `scheduler`, `maintenance`: the tasks; they know trio and the protocol, nothing else.
- `processes`: the real world: the system's clocks, repositories on disk, commands; `child`: a
  program run to its end; `base`: the base directory there was at the start.
- `daemon`, `state`, `console`: one process per base directory around it all.

Two times: *wall* is UTC in seconds since 1970, which may jump; *steady* only moves forward. Slots
and revisions have wall times; waiting and "how long ago" go by steady time, so that a clock that
is set neither loses a backup nor starts all of them at once.
"""
