"""Two hosts on one machine: network namespaces with a cable between them, which can be cut."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megashear.config import PretrainRun, PruneRun
from tests.crash.phases import Phases

ROOT = Path(__file__).parents[1]
ADDRESSES = ("10.213.0.1", "10.213.0.2")
"""Of the hosts; nobody else is in their network."""
_PORT = 29400
_CABLE = "cable0"
"""Name of the network interface, on both."""


def why_not() -> str | None:
    """Why this machine cannot have two hosts; None if it can."""
    if shutil.which("ip") is None:
        return "there is no `ip` (Debian's iproute2)"
    name = f"megashear-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces are not permitted here: {tried.stderr.strip()}"
    try:
        # a cable needs a kernel that has such
        words = ["link", "add", _CABLE, "type", "veth", "peer", "name", "other0"]
        tried = subprocess.run(["ip", "-n", name, *words], capture_output=True, text=True)
        return f"there is no veth here: {tried.stderr.strip()}" if tried.returncode else None
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """Two network namespaces."""

    names: tuple[str, str]

    def cut(self) -> None:
        """Take down the second host's interface; nobody tells either that the other is gone."""
        _ip("-n", self.names[1], "link", "set", _CABLE, "down")

    def mend(self) -> None:
        """Bring it up again."""
        _ip("-n", self.names[1], "link", "set", _CABLE, "up")

    def torchrun(
        self, host: int, processes: int, log: Path, *words: str
    ) -> subprocess.Popen[bytes]:
        """Start one host's part of a job.

        Args:
            host: 0 or 1; the first is where they meet.
            processes: ranks on it.
            log: file that all output is appended to.
            words: what torchrun runs.
        """
        agent = [
            *("--nnodes=2", f"--nproc-per-node={processes}", f"--local-addr={ADDRESSES[host]}"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:{_PORT}", "--rdzv-id=job"),
            # the machine's own name says nothing about addresses in here
            f"--rdzv-conf=is_host={host == 0},join_timeout=120,read_timeout=20",
        ]
        with log.open("a") as output:
            return subprocess.Popen(
                [
                    *("ip", "netns", "exec", self.names[host]),
                    *(sys.executable, "-m", "torch.distributed.run", *agent, *words),
                ],
                cwd=ROOT,
                env=os.environ
                | {
                    "PYTHONPATH": str(ROOT),
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": _CABLE,
                },
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def end(self) -> None:
        """Kill all processes on them."""
        for name in self.names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in found.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make them, and remove them with all that runs there, whatever happens."""
    hosts = Hosts(names=(f"megashear-{os.getpid()}-a", f"megashear-{os.getpid()}-b"))
    try:
        for name in hosts.names:
            _ip("netns", "add", name)
        peer = ["type", "veth", "peer", "name", _CABLE, "netns", hosts.names[1]]
        _ip("-n", hosts.names[0], "link", "add", _CABLE, *peer)
        for name, address in zip(hosts.names, ADDRESSES):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", _CABLE)
            for interface in ("lo", _CABLE):
                _ip("-n", name, "link", "set", interface, "up")
        yield hosts
    finally:
        hosts.end()
        for name in hosts.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@dataclass(frozen=True, kw_only=True)
class CutOff:
    """What happened to a job whose second host was cut off."""

    seconds: tuple[float, float]
    """From the cut until all ranks of each host had ended."""
    code: int
    """Exit code of the first host's torchrun after the cut. The other's waits for the store on the
    first host, however long, and is ended as a batch system would."""
    said: tuple[str, str]
    """All output of each host until then."""
    went_on: tuple[int, int]
    """Exit codes of both after the second start."""
    steps_again: int
    """Steps that the second start took."""


def cut_off(
    config: PruneRun | PretrainRun, processes: int, folder: Path, *, at_step: int
) -> CutOff:
    """Run a job over two hosts, cut one off, mend the cable and start the job again.

    Args:
        config: the run; its --resume and --distributed-timeout-minutes are what is tried.
        processes: ranks on each host.
        folder: for logs.
        at_step: step during which the cable is cut, from 1.
    """
    logs = [folder / f"host-{host}.log" for host in range(2)]
    train = replace(config.train, resume=True)
    file = folder / "config.pickle"
    file.write_bytes(pickle.dumps(replace(config, train=train)))
    with two_hosts() as hosts, Phases(folder / "pipe") as phases:
        words = ("-m", "tests.crash.worker", str(phases.pipe), str(file))
        jobs = [hosts.torchrun(host, processes, logs[host], *words) for host in range(2)]
        steps = 0
        while steps < at_step:
            steps += phases.read().count((0, "training"))
            assert all(job.poll() is None for job in jobs), [log.read_text() for log in logs]
            time.sleep(0.01)
        hosts.cut()
        begin, ended = time.monotonic(), [0.0, 0.0]
        ranks = [[phases.pids[host * processes + n] for n in range(processes)] for host in (0, 1)]
        while not all(ended) or jobs[0].poll() is None:
            phases.read()  # or the ranks would wait for room in it
            for host, pids in enumerate(ranks):
                if not ended[host] and not any(map(_runs, pids)):
                    ended[host] = time.monotonic() - begin
            assert time.monotonic() - begin < 150, [log.read_text() for log in logs]
            time.sleep(0.05)
        said = (logs[0].read_text(), logs[1].read_text())
        hosts.end()  # as a batch system does when a job has failed
        hosts.mend()
        for job in jobs:
            job.wait()
        again = [hosts.torchrun(host, processes, logs[host], *words) for host in range(2)]
        steps = 0
        for job in again:
            while job.poll() is None:
                steps += phases.read().count((0, "training"))
                assert time.monotonic() - begin < 300, [log.read_text() for log in logs]
                time.sleep(0.05)
        steps += phases.read().count((0, "training"))
    return CutOff(
        seconds=(ended[0], ended[1]),
        code=jobs[0].returncode,
        said=said,
        went_on=(again[0].returncode, again[1].returncode),
        steps_again=steps,
    )


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
