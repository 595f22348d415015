"""The daemon: the scheduler with the world around it, one per base directory.

SIGTERM, SIGINT and SIGQUIT end it: running backups may finish within `stop-timeout`. SIGHUP reads
the configuration again; if that has problems the old one stays, and the log says why.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from functools import partial

import trio

from backyfs import notify
from backyfs.config.site import Settings, Site
from backyfs.engine.scheduling import state
from backyfs.engine.scheduling.base import Base
from backyfs.engine.scheduling.console import Actions, Console
from backyfs.engine.scheduling.processes import Processes
from backyfs.engine.scheduling.scheduler import Scheduler
from backyfs.engine.scheduling.world import Contents
from backyfs.errors import BackyfsError
from backyfs.store import lock

log = logging.getLogger(__name__)

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


def serve(load: Callable[[], Site]) -> None:
    """Schedule until a signal ends it. `load` reads the configuration: ConfigError.

    Busy: another daemon keeps this base directory.
    """
    site = load()
    base = Base(site.settings.base_dir)
    with lock.exclusive(site.settings.lock_path, 0.0, f"another scheduler keeps {base.path}"):
        trio.run(_Daemon(site, base, load).run)


class _Daemon:
    def __init__(self, site: Site, base: Base, load: Callable[[], Site]) -> None:
        settings = site.settings
        self._load = load
        self._base = base
        self._world = Processes(
            base, site.path.absolute(), callback=settings.backup_completed_callback
        )
        memories = state.read_memories(base.path)
        self._scheduler = Scheduler(site, self._world, memories)
        self._remembered: object = None
        self._reloading = trio.Lock()

    async def run(self) -> None:
        """Everything; returns when a signal came and what ran has ended."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._obey_signals)
            nursery.start_soon(self._listen, self._scheduler.site.settings)
            nursery.start_soon(_keep_alive)
            nursery.start_soon(self._write_status)
            log.info("scheduler started", {"jobs": len(self._scheduler.site.jobs)})
            notify.tell(notify.READY)
            await self._scheduler.run()
            nursery.cancel_scope.cancel()
        self._save()
        log.info("scheduler ended")

    async def _obey_signals(
        self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(*_STOP, signal.SIGHUP) as signals:
            task_status.started()
            async with trio.open_nursery() as nursery:
                async for number in signals:
                    if number == signal.SIGHUP:  # which may take long: see to the next signal
                        nursery.start_soon(self.reload)
                    else:
                        self._stop(number)

    def _stop(self, number: int) -> None:
        running = sum(1 for job in self._scheduler.jobs.values() if job.running)
        timeout_s = self._scheduler.site.settings.stop_timeout_s
        values = {"signal": signal.Signals(number).name, "running": running, "limit_s": timeout_s}
        log.info("stopping", values)
        notify.tell(
            notify.STOPPING,
            f"STATUS=waiting for {running} running backups",
            f"EXTEND_TIMEOUT_USEC={(timeout_s + 60) * 1_000_000}",
        )
        self._scheduler.stop()

    async def reload(self) -> str:
        """Read the configuration again; returns, and logs, what came of it. One at a time."""
        async with self._reloading:
            return await self._reload()

    async def _reload(self) -> str:
        notify.reloading()
        try:
            # A file system that hangs keeps nobody from ending us.
            site = await trio.to_thread.run_sync(self._load, abandon_on_cancel=True)
        except BackyfsError as exc:
            log.error("configuration not reloaded, the old one stays", {"reason": exc.message})
            return f"Not reloaded, the old configuration stays.\n{exc.message}"
        finally:
            notify.tell(notify.READY)
        fixed = self._scheduler.reload(site)
        self._world.callback = site.settings.backup_completed_callback
        log.info("configuration reloaded", {"jobs": len(site.jobs)})
        reply = "Triggering daemon reload.\nDaemon configuration reloaded."
        if fixed:
            log.warning("some settings need a restart", {"settings": ", ".join(fixed)})
            reply += f"\nNeeds a restart: {', '.join(fixed)}"
        return reply

    async def _listen(self, settings: Settings) -> None:
        """Serve the console; backups matter more than it, so what fails is only logged."""
        if not settings.telnet_port:
            return
        console = Console(self._scheduler, Actions(self.reload, self._contents))
        async with trio.open_nursery() as nursery:
            for address in settings.telnet_addrs:
                serve = partial(trio.serve_tcp, console.serve, settings.telnet_port, host=address)
                try:
                    await nursery.start(serve)
                except OSError as exc:
                    values = {"address": address, "port": settings.telnet_port}
                    log.warning("no console", {**values, "reason": exc.strerror or str(exc)})

    async def _contents(self, name: str) -> Contents:
        return await self._world.contents(self._scheduler.jobs[name].config)

    async def _write_status(self) -> None:
        while True:
            await trio.sleep(min(1.0, self._scheduler.site.settings.status_interval_s))
            self._save()
            await trio.sleep(self._scheduler.site.settings.status_interval_s)

    def _save(self) -> None:
        """Write status and memory; a full disk must not end the daemon, nor one keep the other."""
        scheduler = self._scheduler
        if not all(job.known for job in scheduler.jobs.values()):
            return  # nothing is said of a job whose repository was not looked at
        with _going_on("status not written"):
            state.write_status(scheduler.site.settings.status_path, scheduler.jobs.values())
        with _going_on("memory not written"):
            memories = {name: memory.encode() for name, memory in scheduler.memories().items()}
            if memories != self._remembered:
                self._base.require()  # no other directory gets one; the status tells of it
                state.write_memories(self._base.path, scheduler.memories())
                self._remembered = memories
        notify.status(_summary(scheduler))


@contextlib.contextmanager
def _going_on(message: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        log.warning(message, {"reason": exc.strerror or str(exc)})
    except BackyfsError as exc:
        log.warning(message, {"reason": exc.message})


async def _keep_alive() -> None:
    """Give systemd signs of life while trio's loop turns, twice as often as it wants them."""
    interval_s = notify.watchdog_s()
    while interval_s:
        notify.tell(notify.WATCHDOG)
        await trio.sleep(interval_s / 2)


def _summary(scheduler: Scheduler) -> str:
    jobs = scheduler.jobs.values()
    running = sum(1 for job in jobs if job.running)
    late = sum(1 for job in jobs if job.overdue_s())
    return f"{len(jobs)} jobs, {running} running, {late} not within SLA"
