"""Two hosts on one machine: namespaces for network, processes and names, each with an sshd; a cable that can be cut.

    Hosts() -> veth pair 10.77.0.1 - 10.77.0.2, an sshd as process 1 of each -> deepspeed --hostfile through pdsh

Needs root, iproute2, openssh-server and pdsh. All processes of a host see only their host's, so that what DeepSpeed
does to a host (its launcher ends a run by `pkill -f`) stays there.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.trainer.launch import ROOT, SMALL

NEEDED = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "pdsh")
SSHD = "/usr/sbin/sshd"
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def missing() -> str:
    """Why two hosts cannot be had here, or ''."""
    if os.geteuid() != 0:
        return "needs root"
    lacking = [name for name in NEEDED if not shutil.which(name)] + ([] if Path(SSHD).is_file() else ["sshd"])
    if lacking:
        return f"needs {', '.join(lacking)}"
    made = subprocess.run(["ip", "netns", "add", "gato-try"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "gato-try"], capture_output=True)
    return made.stderr.strip()


class Hosts:
    """Hosts 0 and 1, up until `close`."""

    def __init__(self, folder: Path):
        self.folder, self.names = folder, [f"gato-{os.getpid()}-{number}" for number in range(2)]
        self.sshd: list[subprocess.Popen | None] = [None, None]
        Path("/run/sshd").mkdir(exist_ok=True)
        self._configure()
        for name in self.names:
            _do("ip", "netns", "add", name)
        cable = [f"gato{os.getpid()}{end}"[:15] for end in "ab"]
        _do("ip", "link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for name, end, address in zip(self.names, cable, ADDRESSES):
            _do("ip", "link", "set", end, "netns", name)
            self._in(name, "ip", "link", "set", end, "name", "eth0")
            self._in(name, "ip", "address", "add", f"{address}/24", "dev", "eth0")
            self._in(name, "ip", "link", "set", "eth0", "up")
            self._in(name, "ip", "link", "set", "lo", "up")
        for number in range(2):
            self.boot(number)

    def _configure(self) -> None:
        for key in ("host", "user"):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        shutil.copy(self.folder / "user.pub", self.folder / "authorized")
        server = {"HostKey": self.folder / "host", "AuthorizedKeysFile": self.folder / "authorized",
                  "PidFile": "none", "StrictModes": "no", "UsePAM": "no", "PermitRootLogin": "yes"}  # fmt: skip
        client = {"IdentityFile": self.folder / "user", "StrictHostKeyChecking": "no",
                  "UserKnownHostsFile": "/dev/null", "LogLevel": "ERROR", "BatchMode": "yes"}  # fmt: skip
        for name, body in (("sshd_config", server), ("ssh_config", client)):
            (self.folder / name).write_text("".join(f"{key} {value}\n" for key, value in body.items()))
        # what pdsh passes on to the hosts
        (self.folder / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n")

    def _in(self, name: str, *command: str) -> None:
        _do("ip", "netns", "exec", name, *command)

    def boot(self, number: int) -> None:
        """Start a host that is off."""
        inside = f"hostname host-{number} && exec {SSHD} -D -e -f {self.folder}/sshd_config"
        command = ["ip", "netns", "exec", self.names[number], "unshare", "--uts", "--pid", "--fork", "--mount-proc"]
        with (self.folder / f"sshd-{number}.log").open("a") as log:
            self.sshd[number] = subprocess.Popen(
                [*command, "--kill-child", "sh", "-c", inside], stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 30
        while not self._answers(number):
            assert time.monotonic() < deadline, (self.folder / f"sshd-{number}.log").read_text()
            time.sleep(0.1)

    def _answers(self, number: int) -> bool:
        try:
            command = ["ssh", "-F", str(self.folder / "ssh_config"), ADDRESSES[number], "true"]
            return not subprocess.run([*self._enter(number), *command], capture_output=True).returncode
        except IndexError:  # not yet started
            return False

    def _process_1(self, number: int) -> psutil.Process:
        sshd = self.sshd[number]
        assert sshd is not None
        return psutil.Process(sshd.pid).children()[0]

    def _enter(self, number: int) -> list[str]:
        return ["nsenter", "--target", str(self._process_1(number).pid), "--all"]

    def on(self, number: int, *command: str) -> None:
        """Run a command on a host."""
        _do(*self._enter(number), *command)

    def power_off(self, number: int) -> None:
        """End all processes of a host at once."""
        sshd = self.sshd[number]
        assert sshd is not None
        self._process_1(number).kill()
        sshd.wait(30)

    def cable(self, state: str) -> None:
        """'down' cuts it, 'up' mends it."""
        self._in(self.names[1], "ip", "link", "set", "eth0", state)

    def start(self, output: Path, data: Path, steps: int, slots: tuple[int, int] = (1, 1), *extra: str):
        """`deepspeed --hostfile` on host 0, a process per slot; its output goes to a file beside the run."""
        hostfile = self.folder / "hostfile"
        hosts = [(address, count) for address, count in zip(ADDRESSES, slots) if count]
        hostfile.write_text("".join(f"{address} slots={count}\n" for address, count in hosts))
        command = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(hostfile), "--force_multi",
                   "--no_ssh_check", "--master_addr", ADDRESSES[0], "--master_port", "29511"]  # fmt: skip
        run = ["--run.output", str(output), "--steps", str(steps), "--run.log-every", "1", "--run.save-every", "2",
               "--run.patience-minutes", "0.3", "--data.folders", str(data)]  # fmt: skip
        words = [*command, str(ROOT / "trainer" / "main.py"), "--recipe", "tiny", *SMALL.split(), *run, *extra]
        ssh = {"PDSH_SSH_ARGS_APPEND": f"-F {self.folder}/ssh_config", "PYTHONPATH": str(ROOT)}
        with output.with_suffix(".log").open("a") as log:
            return subprocess.Popen(
                [*self._enter(0), f"--wd={self.folder}", *words], cwd=self.folder, env=os.environ | ssh, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip

    def close(self) -> None:
        """Switch both hosts off and take everything away."""
        for number, sshd in enumerate(self.sshd):
            if sshd is not None and sshd.poll() is None:
                self.power_off(number)
            subprocess.run(["ip", "netns", "del", self.names[number]], capture_output=True)


def interrupt(process: subprocess.Popen, number: int = signal.SIGINT) -> None:
    """A terminal's Ctrl-C."""
    os.killpg(process.pid, number)


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
