"""
One run's directory: its lock, config, metrics and status, and the signals that end a run in good order.

runs/<run_name>/ holds config.json (settings, machine, data, kernels), source.diff (git commit and changes),
metrics.jsonl (one line per update), status.json (reason, step and exit code of the last end), and the checkpoints
step-*/. compare.py --card shows all of it.
"""

import fcntl
import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

from files import for_json, fsync, read_text, write_all, write_json, write_text

# exit codes
DONE = 0
BAD_OPTION = 2  # or config, or the data changed since the run began
IN_USE = 3  # the run directory
NO_VALID_CHECKPOINT = 4  # there are some, but none is valid
CANNOT_WRITE = 5
NOT_FINITE = 6  # loss or gradient
BAD_DATA = 7  # missing, empty or invalid
LOST = 8  # another process of the run is gone, or hangs
STOPPED = 75  # by a signal, resumable
INTERRUPTED = 130  # second Ctrl-C


class BadOption(ValueError):
    exit_code = BAD_OPTION


class RunDirInUse(Exception):
    exit_code = IN_USE


class NoValidCheckpoint(Exception):
    exit_code = NO_VALID_CHECKPOINT


class CannotWrite(Exception):
    exit_code = CANNOT_WRITE


class NotFinite(Exception):
    exit_code = NOT_FINITE


class DataError(ValueError):
    exit_code = BAD_DATA


@contextmanager
def writing(path: Path):
    """Turns an OSError into CannotWrite."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(cannot_write(path, error)) from error


def directory_of(run: str, out_dir: str) -> Path | None:
    """That of a run, or of a folder of runs, named under out_dir or by its path."""
    places = Path(out_dir) / run, Path(run)
    return next((path for path in places if os.path.isdir(path)), None)  # False, not an error, for a name too long


def cannot_write(path: Path, error: BaseException) -> str:
    """Why, and what the disk has left."""
    why = getattr(error, "strerror", None) or error
    with suppress(OSError):
        return f"cannot write to {path}: {why} ({shutil.disk_usage(existing(path)).free:,} bytes free)"
    return f"cannot write to {path}: {why}"


def existing(path: Path) -> Path:
    """The path itself, or the nearest directory above it that is there."""
    return next(parent for parent in (path, *path.parents) if os.path.exists(parent))  # False for a name too long


def check_writable(path: Path):
    """Raises CannotWrite unless `path`, or the directory in which it would be made, can be written to."""
    with writing(path):
        place = existing(path)
        longest = max((len(os.fsencode(name)) for name in path.parts), default=0)
        most = os.pathconf(place, "PC_NAME_MAX")  # else the directories above it would be made first
    if longest > most:
        raise CannotWrite(f"cannot write to {path}: a name of {longest} bytes, {most} are possible: choose a "
                          "shorter one (--run_name)")
    if not place.is_dir():
        raise CannotWrite(f"{place} is not a directory: choose another --out_dir")
    if not os.access(place, os.W_OK):
        raise CannotWrite(f"{place} is not writable: choose another --out_dir")


class RunDir:
    """The directory of a run; nothing is touched before `open`, and one process at a time holds it open."""

    def __init__(self, path: Path):
        self.path, self.begun, self.step, self.mirror, self.saver = path, False, 0, None, None
        self.lock, self.last_row = None, {}

    def open(self):
        """Raises RunDirInUse or CannotWrite. The lock belongs to the process: it is free however the process ends."""
        with writing(self.path):
            made = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            for path in made or [self.path]:  # a checkpoint is of no use in a directory that a power loss takes away
                fsync(path.parent)
            self.lock = open(self.path / ".lock", "a")
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunDirInUse(f"{self.path} is in use by another process") from error

    def begin(self, config: dict, step: int):
        """
        config.json, and `source_diff` in source.diff. A run that goes on after `step` updates leaves both as they are
        and adds source-<step>.diff.
        """
        with writing(self.path):
            if step == 0:
                write_json(self.path / "config.json", config)  # without the kernels, which are not known yet
            source = self.path / (f"source-{step:08d}.diff" if step else "source.diff")
            source.write_bytes(source_diff(self.path.parent))
            fsync(source)
            (self.path / "status.json").unlink(missing_ok=True)  # of the end before this one
        self.begun, self.step = True, step

    def describe(self, config: dict, step: int):
        """config.json again, now complete; of a run that goes on after `step` updates, config-<step>.json."""
        with writing(self.path):
            write_json(self.path / (f"config-{step:08d}.json" if step else "config.json"), config)

    def lacks_evaluation(self, step: int) -> bool:
        """Whether the run was ended, in another way than in good order, before this update was evaluated."""
        lines = read_text(self.path / "metrics.jsonl").splitlines()[:step]
        return len(lines) == step and "val_loss" not in parse_object(lines[-1]) and not self.ended_well()

    def ended_well(self) -> bool:
        return read_json(self.path / "status.json").get("code") == DONE

    def open_metrics(self, step: int) -> float:
        """
        Cuts metrics.jsonl back to the first `step` updates; lines that are missing or damaged become {"step": n}, so
        that line n stays the n-th update. Returns the training time up to there in seconds.
        """
        path = self.path / "metrics.jsonl"
        with writing(path):
            lines = path.read_text(errors="replace").splitlines()[:step] if path.exists() else []
            rows = [parse_object(line) for line in lines]
            n_good = next((n for n, row in enumerate(rows) if not is_row(row, n + 1)), len(rows))
            missing = [json.dumps({"step": n}) for n in range(n_good + 1, step + 1)]
            lines = lines[:n_good] + missing
            write_text(path, "".join(line + "\n" for line in lines))
            self.last_row = json.loads(lines[-1]) if lines else {}
            self.last_bytes = len(lines[-1].encode()) + 1 if lines else 0
            self.metrics, self.step = open(path, "r+b", buffering=0), step
            self.n_synced, self.unsynced, self.n_written = path.stat().st_size, bytearray(), 0  # n_*: bytes
        if missing:
            print(f"{path}: steps {n_good + 1} to {step} are missing or damaged", file=sys.stderr)
        return max((row.get("time_s", 0.0) for row in rows[:n_good]), default=0.0)

    def log(self, row: dict):
        """
        One line of metrics.jsonl, and wandb's copy of it; what is not finite becomes null. A line that cannot be
        written waits for the next one, or for `sync`.
        """
        finite = for_json(row)
        self.unsynced += json.dumps(finite).encode() + b"\n"
        with suppress(OSError):
            if len(self.unsynced) < 2**20:
                self.write_lines()
            else:
                self.sync()
        self.step = row["step"]
        if self.mirror:
            self.mirror.log(finite)

    def amend(self, found: dict):
        """Adds to the last line that `open_metrics` left."""
        self.n_synced -= self.last_bytes
        self.log(self.last_row | found)

    def write_lines(self):
        """At the place where they belong, so that what a full disk cut off is written over. Raises OSError."""
        self.metrics.seek(self.n_synced + self.n_written)
        write_all(self.metrics, self.unsynced[self.n_written:])
        self.n_written = len(self.unsynced)

    def sync(self):
        """
        Waits until metrics.jsonl is on the disk: a checkpoint must not be ahead of it. Raises OSError; then all lines
        since the last time are written again, since the system may have lost them, and says so only once.
        """
        self.write_lines()
        self.n_written = 0
        os.fsync(self.metrics.fileno())
        self.n_synced, self.unsynced = self.n_synced + len(self.unsynced), bytearray()

    def close(self, reason: str, code: int):
        """The end, but for what `note_end` does."""
        for beside in filter(None, (self.mirror, self.saver)):
            beside.close()
        self.mirror = self.saver = None
        self.note_end(reason, code)
        if self.lock:
            self.lock.close()

    def note_end(self, reason: str, code: int):
        """status.json: how it ended. Does nothing unless the run has begun: a refused one changes nothing."""
        if self.begun:
            with writing(self.path):
                write_json(self.path / "status.json", {"reason": reason, "step": self.step, "code": code})


def has_lines(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def read_json(path: Path) -> dict:
    """The JSON object in a file; {} if the file is missing or damaged."""
    return parse_object(read_text(path))


def parse_object(text: str) -> dict:
    """A JSON object; {} if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def is_row(row: dict, step: int) -> bool:
    """Whether this is the line of this update, with time and tokens that later ones can be added to, or with none."""
    time_s = row.get("time_s", 0.0)
    return (row.get("step") == step and isinstance(time_s, float) and 0 <= time_s < math.inf
            and isinstance(row.get("tokens", 0), int))


def progress(row: dict) -> str:
    """A row of metrics.jsonl for the end of the progress bar."""
    mfu = f"{row['mfu']:.1%} MFU" if row["mfu"] else "MFU unknown"
    memory = f", {row['peak_mib']:,.0f} MiB" if row["peak_mib"] else ""
    return (f"loss {row['loss']:.4f}, lr {row['lr']:.2e}, grad norm {row['grad_norm']:.2f}, {row['step_ms']:,.0f} ms, "
            f"{row['tokens_per_s']:,.0f} tokens/s, {mfu}{memory}")


def source_diff(out_dir: Path) -> bytes:
    """
    The git commit of the code, then what `git apply` makes the code from it with: what differs, and the files up to
    1 MiB that are neither tracked nor ignored, nor in out_dir, where runs lie; larger ones are named. Nothing if it is
    no git checkout. Raises OSError.
    """
    root, out_dir, commit = Path(__file__).resolve().parent, out_dir.resolve(), git("rev-parse", "HEAD")
    of_runs = out_dir if root in out_dir.parents else None
    if not commit:
        return b""
    with tempfile.TemporaryDirectory() as beside:  # an index of its own, in which the untracked files are announced
        index = {"env": os.environ | {"GIT_INDEX_FILE": f"{beside}/index"}}
        git("read-tree", "HEAD", **index)
        git("update-index", "-q", "--refresh", **index)
        names = git("ls-files", "--others", "--exclude-standard", "--exclude=source*.diff", "-z", **index)
        names = [name for name in names.split(b"\0")[:-1] if of_runs not in (root / os.fsdecode(name)).parents]
        small = [name for name in names if (path := root / os.fsdecode(name)).is_file()
                 and path.lstat().st_size <= 2**20]
        if left := [os.fsdecode(name) for name in names if name not in small]:
            commit += f"# {len(left)} untracked, not below: {left[:20]}\n".encode()
        git("--literal-pathspecs", "add", "--intent-to-add", "--pathspec-from-file=-", "--pathspec-file-nul",
            input=b"\0".join(small), **index)
        return commit + git("diff-index", "--patch", "--binary", "HEAD", **index)


def git(*arguments: str, **options) -> bytes:
    """What git prints about the code; nothing if the code is not a git checkout. options: of subprocess.run."""
    root = Path(__file__).parent
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=True, **options).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""


class StopSignal:
    """
    `received` is the name of the first SIGINT, SIGTERM or SIGHUP, or None. A second Ctrl-C ends the process at once;
    under torchrun it does not, since each process gets the terminal's signal and torchrun's own.
    """

    def __init__(self, distributed: bool):
        self.received, self.distributed = None, distributed
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's command ignores it
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.received is None:
            self.received = signal.Signals(number).name
            os.write(2, f"\n{self.received}: stopping after the step in hand\n".encode())  # print could be re-entered
        elif number == signal.SIGINT and not self.distributed:
            os._exit(INTERRUPTED)


class WandbMirror:
    """
    Sends metrics to Weights & Biases from a thread of its own. Whatever goes wrong there, or however slow it is, is
    one printed line at most, and the run goes on: rows that wait are dropped when 10,000 do, and `close` waits 10 s.
    """

    def __init__(self, **init_options):
        self.rows = queue.Queue(maxsize=10_000)
        self.thread = threading.Thread(target=self.send, args=(init_options,), daemon=True)
        self.thread.start()

    def send(self, init_options):
        try:
            import wandb

            mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
            run = wandb.init(mode=mode, settings={"console": "off"}, **init_options)
            while (row := self.rows.get()) is not None:
                run.log(row, step=row["step"])
            run.finish()
        except BaseException as error:
            print(f"wandb: {type(error).__name__}: {error}; training goes on without it", file=sys.stderr)

    def log(self, row: dict | None):
        """Hands a row over; None is the end."""
        if not self.rows.full():
            self.rows.put_nowait(row)

    def close(self):
        """Waits up to 10 s for what has not been sent."""
        self.log(None)
        self.thread.join(timeout=10)
        if self.thread.is_alive():
            print("wandb: not finished after 10 s, left behind", file=sys.stderr)


def leave(code: int):
    """Ends the process without waiting for threads and exit hooks: wandb's may be stuck."""
    with suppress(OSError):  # a closed pipe
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
