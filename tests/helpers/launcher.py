"""
Starts Python programs without waiting for imports.

Importing torch, transformers and the rest takes 5 to 13 seconds of CPU time, a run of the tiny
model not even two. So one process, the parent of all runs, has imported the libraries (never the
code under test), and forks itself for each run. To the run everything is as after
`python script.py ...` or `python -m module ...`: arguments, environment, working folder, exit
status, what happens at exit.

torchrun is the real one, started as `-m torch.distributed.run`; only its ranks are forked as well.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import resource
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import psutil

# Read by libraries while they are imported, so that no run can have other values.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
LIBRARIES = (
    *("accelerate", "av", "bitsandbytes", "datasets", "deepspeed", "peft"),
    *("sklearn.datasets", "torch", "torch._dynamo", "torch.distributed.launcher", "torchvision"),
    *("transformers", "transformers.trainer", "transformers.integrations.deepspeed"),
    *("transformers.models.clip.modeling_clip", "transformers.models.phi3.modeling_phi3"),
)


# ---------------------------------------------------------------- the tests' side


class Process:
    """A run: what subprocess.Popen has, as far as the tests need it."""

    def __init__(self, pid: int, output: Path, connection: socket.socket):
        self.pid = pid
        self.returncode: int | None = None
        self.output = output
        self._connection = connection

    def poll(self) -> int | None:
        """The exit status, negative after a signal; None as long as it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """
        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        if self.returncode is None:
            # A timeout of 0 would mean not to block, which is another error.
            self._connection.settimeout(timeout if timeout is None else max(timeout, 1e-4))
            try:
                status = self._connection.recv(16)
            except TimeoutError:
                raise subprocess.TimeoutExpired(f"run {self.pid}", timeout) from None
            assert status, f"the launcher ended; {self.output.read_text()}"
            self.returncode = int(status)
            self._connection.close()
        return self.returncode

    def text(self) -> str:
        """All that it and its ranks have written until now."""
        return self.output.read_text(errors="replace")

    def finish(self, timeout: float = 600) -> str:
        """Wait for the end; returns the output."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end after {timeout} s:\n{self.text()}") from None
        return self.text()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def children(self) -> list[psutil.Process]:
        """Of torchrun: its ranks, which are in sessions of their own."""
        return psutil.Process(self.pid).children()

    def kill(self) -> None:
        """SIGKILL to the run and all that it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            for victim in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
        self.wait(60)


class Launcher:
    """The parent of all runs, and what starts them there. The process starts with the first."""

    def __init__(self):
        self._parent: subprocess.Popen | None = None
        self._folder = tempfile.TemporaryDirectory()
        self._said = Path(self._folder.name) / "parent.txt"
        cache = {"HF_DATASETS_CACHE": str(Path(self._folder.name) / "cache")}
        self._environment = {**ENVIRONMENT, **cache}
        self._running: list[Process] = []

    def start(
        self,
        *words: object,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        file_size: int | None = None,
    ) -> Process:
        """
        Run `python *words`: a script with its arguments, or `-m`, a module and its arguments.

        Args:
            env: variables on top of the present environment.
            file_size: no file may become larger, in bytes (RLIMIT_FSIZE).
        """
        if self._parent is None:
            self._start_parent()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # whole messages
        number, output = tempfile.mkstemp(suffix=".txt", dir=self._folder.name)
        os.close(number)
        request = {
            "words": [str(word) for word in words],
            "env": {**os.environ, **self._environment, **(env or {})},
            "cwd": str(cwd or Path.cwd()),
            "file_size": file_size,
            "output": output,
        }
        socket.send_fds(self._control, [json.dumps(request).encode()], [theirs.fileno()])
        theirs.close()
        pid = ours.recv(16)
        assert pid, self._said.read_text()
        process = Process(int(pid), Path(output), ours)
        self._running = [p for p in self._running if p.returncode is None] + [process]
        return process

    def run(self, *words: object, status: int = 0, **options: object) -> str:
        """The output of a run that has to end with `status`."""
        process = self.start(*words, **options)
        output = process.finish()
        assert process.returncode == status, output
        return output

    def end_runs(self) -> None:
        """Kill what a failed test has left running."""
        for process in self._running:
            if process.poll() is None:
                process.kill()
        self._running = []

    def close(self) -> None:
        self.end_runs()
        if self._parent is not None:
            self._control.close()
            self._parent.wait(60)
        self._folder.cleanup()

    def _start_parent(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, self._said.open("w") as said:
            self._parent = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env={**os.environ, **self._environment},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,  # Ctrl-C is for the tests, which then end it
            )


def torchrun(processes: int, *words: object, restarts: int = 0) -> tuple[object, ...]:
    """torchrun's command line on one machine, for `Launcher.start`."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    return (*launcher, f"--max_restarts={restarts}", *words)


# ---------------------------------------------------------------- the parent of all runs


def serve(control: socket.socket) -> dict | None:
    """
    Fork for each request. Returns the request in the process that is to run it, and None in the
    parent when the tests have ended.
    """
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.data is not None:
                pid, connection = key.data
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):  # a test that has failed asks no more
                    connection.send(str(status).encode())
                connection.close()
                selector.unregister(key.fd)
                os.close(key.fd)
                continue
            message, descriptors, *_ = socket.recv_fds(control, 1 << 20, 1)
            if not message:
                return None
            connection = socket.socket(fileno=descriptors[0])
            pid = os.fork()
            if pid == 0:
                connection.close()
                for other in list(selector.get_map().values()):
                    os.close(other.fd) if other.data else control.close()
                    if other.data:
                        other.data[1].close()
                selector.close()
                return json.loads(message)
            connection.send(str(pid).encode())
            ended = os.pidfd_open(pid)
            selector.register(ended, selectors.EVENT_READ, (pid, connection))


def become(request: dict) -> None:
    """Turn this process into the one that a request asks for; returns when its program has."""
    os.setsid()
    number = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    os.dup2(number, 1)
    os.dup2(number, 2)
    os.close(number)
    os.chdir(request["cwd"])
    if request["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
    subprocess_handler.Popen = Rank
    execute(request["words"], request["env"])


def execute(words: list[str], env: Mapping[str, str]) -> None:
    """What `python *words` does."""
    random.seed()
    os.environ.clear()
    os.environ.update(env)
    given = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = [path for path in given if path not in sys.path]
    if words[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


class Rank(subprocess.Popen):
    """A process of torchrun: forked from it where Popen would start Python anew."""

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest
    ) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            os.setsid()
            gc.freeze()  # nothing of torchrun's is tidied up here
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _, *words = args  # Python, its options, and the program
            self._run([word for word in words if word != "-u"], env)

    @staticmethod
    def _run(words: list[str], env: Mapping[str, str]) -> NoReturn:
        """As the interpreter does; but torchrun's frames, which are still there, are not left."""
        status = 1
        try:
            execute(words, env)
            status = 0
        except SystemExit as end:
            if end.code is None or isinstance(end.code, int):
                status = end.code or 0
            else:
                print(end.code, file=sys.stderr)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        with contextlib.suppress(BaseException):
            threading._shutdown()
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def kill_descendants() -> None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def main() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # no page is copied for the sake of its objects' counters
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is None:
        kill_descendants()
    else:
        become(request)


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    main()
