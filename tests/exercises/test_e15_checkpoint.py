"""e15, a checkpoint that survives: written whole or not at all, read only if it is what
was written. Difficulty 4, 60 minutes, 8 points.

Nothing is killed here. Disk stands between the function and the folder: it lets a call
die before, in or after each thing that it does to a file, and says what is left then,
after a kill and after a power cut.
"""

import builtins
import contextlib
import errno
import hashlib
import io
import os
import pathlib
import pickle
import stat
from pathlib import Path

import torch

OLDER, OLD, NEW = b"older " * 9, b"old content " * 20, b"the new content " * 30


OF_PATHLIB = ("open", "replace", "rename", "link", "unlink")


class Crash(BaseException):
    """The process is gone: no except of OSError sees it, and nothing works any more."""


class File:
    """A file that is open for writing. What was written is in this process until it is
    flushed, and dies with it."""

    def __init__(self, disk, raw, text, buffered):
        self.disk, self.raw, self.text, self.buffer = disk, raw, text, bytearray()
        self.buffered = buffered

    def write(self, data):
        self.buffer += data.encode() if self.text else bytes(data)
        if not self.buffered:
            self.flush()
        return len(data)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def flush(self):
        data, self.buffer = bytes(self.buffer), bytearray()
        if data:
            self.disk.write("write", self.raw.write, data)

    def close(self):
        if not self.raw.closed:
            self.flush()
            self.raw.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __getattr__(self, name):  # fileno, name, closed, seek, tell, ...
        if name in ("seek", "tell", "truncate", "read"):
            self.flush()
        return getattr(self.raw, name)


class Disk:
    """A folder for the time of a call. Each thing that is done to it has a moment
    before, one after, and a write one in its middle; at number `crash` the process dies
    there, at number `full` the disk is full."""

    def __init__(self, impl, folder, crash=0, full=0):
        self.impl, self.folder = impl, folder.resolve()
        self.crash, self.full, self.moment, self.dead = crash, full, 0, False
        self.done, self.raws, self.real = [], [], {}
        self.durable = {  # inode: the bytes that a power cut leaves
            os.stat(p).st_ino: p.read_bytes() for p in self.folder.iterdir()
        }
        self.foreign = None  # a rename from another folder

    def tick(self, what, may_fail=True):
        if self.dead:
            raise Crash
        self.moment += 1
        if self.moment == self.crash:
            self.dead, self.where = True, what
            raise Crash
        if self.moment == self.full and may_fail:
            self.where = what
            raise OSError(errno.ENOSPC, "No space left on device")

    def step(self, what, action, *args, **kwargs):
        takes_space = not what.startswith(("delete", "sync the folder"))
        self.tick(f"before: {what}", takes_space)
        result = action(*args, **kwargs)
        self.done.append(what)
        self.tick(f"after: {what}", may_fail=False)
        return result

    def write(self, what, action, data):
        half = len(data) // 2
        self.tick(f"before: {what}")
        action(data[:half])
        self.tick(f"in the middle of: {what}")
        action(data[half:])
        self.done.append(what)
        self.tick(f"after: {what}", may_fail=False)
        return len(data)

    def inside(self, path):
        if isinstance(path, int):
            return True
        return Path(os.fspath(path)).resolve().parent == self.folder

    def open(self, path, mode="r", buffering=-1, *args, **kwargs):
        if not set(mode) & set("wax+") or not self.inside(path):
            return self.real["open"](path, mode, buffering, *args, **kwargs)
        kind = mode.replace("b", "").replace("t", "")
        name = "" if isinstance(path, int) else Path(path).name
        raw = self.step(f"open {name}", self.create, path, kind)
        return File(self, raw, "b" not in mode, buffering != 0)

    def create(self, path, kind):
        fresh = not isinstance(path, int) and not os.path.exists(path)
        raw = io.FileIO(path, kind)
        self.raws.append(raw)
        if fresh:
            self.durable.pop(os.fstat(raw.fileno()).st_ino, None)
        return raw

    def os_open(self, path, flags, *args, **kwargs):
        if not flags & (os.O_WRONLY | os.O_RDWR) or not self.inside(path):
            return self.real["os.open"](path, flags, *args, **kwargs)
        fresh = not os.path.exists(path)
        fd = self.step(f"open {Path(path).name}", self.real["os.open"], path, flags,
                       *args, **kwargs)  # fmt: skip
        if fresh:
            self.durable.pop(os.fstat(fd).st_ino, None)
        return fd

    def os_write(self, fd, data):
        return self.write("write", lambda x: self.real["os.write"](fd, x), bytes(data))

    def fsync(self, fd):
        number = fd if isinstance(fd, int) else fd.fileno()
        found = os.fstat(number)
        if stat.S_ISDIR(found.st_mode):
            return self.step("sync the folder", lambda: None)

        def keep():
            for path in self.folder.iterdir():
                if os.stat(path).st_ino == found.st_ino:
                    self.durable[found.st_ino] = path.read_bytes()

        return self.step("sync a file", keep)

    def sync(self):
        """Of everything, as os.sync does."""

        def keep():
            for path in self.folder.iterdir():
                self.durable[os.stat(path).st_ino] = path.read_bytes()

        self.step("sync a file", keep)
        self.step("sync the folder", lambda: None)

    def move(self, source, target, **kwargs):
        one, other = Path(source).resolve().parent, Path(target).resolve().parent
        if one != other:
            self.foreign = one
        what = f"rename {Path(source).name} to {Path(target).name}"
        return self.step(what, self.real["os.replace"], source, target, **kwargs)

    def link(self, source, target, **kwargs):
        what = f"link {Path(target).name}"
        return self.step(what, self.real["os.link"], source, target, **kwargs)

    def unlink(self, path, **kwargs):
        what = f"delete {Path(path).name}"
        return self.step(what, self.real["os.unlink"], path, **kwargs)

    def no_sendfile(self, *args, **kwargs):  # shutil then writes as everybody does
        raise OSError(errno.ENOTSUP, "not here")

    @contextlib.contextmanager
    def watching(self):
        mine = {
            "open": self.os_open, "write": self.os_write, "fsync": self.fsync,
            "fdatasync": self.fsync, "replace": self.move, "rename": self.move,
            "link": self.link, "unlink": self.unlink, "remove": self.unlink,
            "sync": self.sync, "sendfile": self.no_sendfile,
        }  # fmt: skip
        self.real = {f"os.{n}": getattr(os, n) for n in mine if hasattr(os, n)}
        self.real["open"] = builtins.open
        names = vars(self.impl.extra)
        mine_there = names.get("open")
        kept = getattr(pathlib, "_normal_accessor", None)
        try:
            for name in mine:
                if hasattr(os, name):
                    setattr(os, name, mine[name])
            builtins.open = io.open = self.open
            if kept:  # pathlib of Python 3.10 keeps these functions for itself
                for name in OF_PATHLIB:
                    setattr(kept, name, {**mine, "open": self.open}[name])
            names["open"] = mine_there or self.open
            yield self
        finally:
            for name in mine:
                if hasattr(os, name):
                    setattr(os, name, self.real[f"os.{name}"])
            builtins.open = io.open = self.real["open"]
            if kept:
                for name in OF_PATHLIB:
                    delattr(kept, name)
            del names["open"]
            if mine_there:
                names["open"] = mine_there
            for raw in self.raws:
                raw.close()

    def cut_power(self):
        """Names stay; of a file's bytes, what was synced."""
        for path in self.folder.iterdir():
            path.write_bytes(self.durable.get(os.stat(path).st_ino, b""))


def write(disk, path, content, keep):
    """Call the function under the disk's eyes: None, or the Crash or OSError it ended
    with."""
    try:
        with disk.watching():
            disk.impl.extra.write_atomically(path, content, keep)
    except (Crash, OSError) as error:
        return error
    return None


def new_folder(parent, files):
    folder = parent / str(len(list(parent.iterdir())))
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def states(impl, tmp_path, files, keep, **at):
    """(disk, folder) after a call that died at its first moment, its second, ..."""
    for number in range(1, 200):
        folder = new_folder(tmp_path, files)
        disk = Disk(impl, folder, **{name: number for name in at})
        error = write(disk, folder / "checkpoint.pt", NEW, keep)
        if disk.moment < number:
            assert number > 4, (
                "nothing was seen of what write_atomically does to a file: open, "
                "os.open, os.replace and os.fsync are watched, and what calls them"
            )
            return
        yield disk, folder, error


def check_target(folder, disk, allowed, kind):
    path = folder / "checkpoint.pt"
    if not path.exists():
        assert None in allowed, (
            f"after {kind} ({disk.where}) there is no checkpoint at all: the old one "
            "must not go before the new one has its name"
        )
        return
    found = path.read_bytes()
    if found in allowed:
        return
    synced = "sync a file" in disk.done
    renamed = any(what.endswith("to checkpoint.pt") for what in disk.done)
    if kind == "a kill" and renamed:
        raise AssertionError(
            f"a kill ({disk.where}) leaves {len(found)} of {len(NEW)} bytes under the "
            "new name: it was renamed before all bytes had left this process"
        )
    if kind == "a kill":
        raise AssertionError(
            f"a kill ({disk.where}) leaves {len(found)} bytes, neither the old file "
            "nor the new one: write beside the target, and rename"
        )
    raise AssertionError(
        f"a power cut ({disk.where}) leaves {len(found)} of {len(NEW)} bytes under the "
        "new name: " + (
            "fsync came before all bytes had left this process: flush first"
            if synced else "without fsync a name may reach the disk before its bytes"
        )
    )  # fmt: skip


def test_it_writes_what_it_is_given(impl, tmp_path):
    path = tmp_path / "checkpoint.pt"
    for content in (OLD, NEW, b""):
        impl.extra.write_atomically(path, content)
        assert path.is_file(), "there is no file afterwards"
        found = path.read_bytes()
        assert found == content, f"{len(content)} bytes given, {len(found)} in the file"
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["checkpoint.pt"], f"files are left beside the target: {left}"


def test_the_first_file_of_a_folder_has_none_to_keep(impl, tmp_path):
    path = tmp_path / "checkpoint.pt"
    try:
        impl.extra.write_atomically(path, NEW, keep=True)
    except OSError as error:
        raise AssertionError(
            f"with keep, into an empty folder, it ends with {error!r}: there is no "
            "file yet that could be kept"
        ) from None
    found = sorted(p.name for p in tmp_path.iterdir())
    assert found == ["checkpoint.pt"], f"there should be one file, yours makes {found}"
    assert path.read_bytes() == NEW, "the file does not hold what was given"


def test_a_kill_or_power_cut_leaves_the_old_file_or_the_new_one(impl, tmp_path):
    for disk, folder, _ in states(impl, tmp_path, {"checkpoint.pt": OLD}, False,
                                  crash=1):  # fmt: skip
        check_target(folder, disk, (OLD, NEW), "a kill")
        disk.cut_power()
        check_target(folder, disk, (OLD, NEW), "a power cut")


def test_the_first_file_is_there_whole_or_not_at_all(impl, tmp_path):
    for keep in (False, True):
        for disk, folder, _ in states(impl, tmp_path, {}, keep, crash=1):
            check_target(folder, disk, (None, NEW), "a kill")
            disk.cut_power()
            check_target(folder, disk, (None, NEW), "a power cut")


def check_previous(folder, disk, kind, allowed=(OLDER, OLD)):
    path = folder / "checkpoint.pt.previous"
    assert path.exists(), (
        f"after {kind} ({disk.where}) there is no <name>.previous: at every moment "
        "there is one"
    )
    found = path.read_bytes()
    assert found != NEW, (
        f"after {kind} ({disk.where}) <name>.previous is the new content: keep the old "
        "file before the new one takes its name"
    )
    assert found in allowed, (
        f"after {kind} ({disk.where}) <name>.previous has {len(found)} bytes, neither "
        "the file before nor the one before that: link or copy, then rename"
    )


def test_the_previous_file_is_there_at_every_moment(impl, tmp_path):
    files = {"checkpoint.pt": OLD, "checkpoint.pt.previous": OLDER}
    for disk, folder, _ in states(impl, tmp_path, files, True, crash=1):
        check_target(folder, disk, (OLD, NEW), "a kill")
        check_previous(folder, disk, "a kill")
        disk.cut_power()
        check_target(folder, disk, (OLD, NEW), "a power cut")
    folder = new_folder(tmp_path, files)
    impl.extra.write_atomically(folder / "checkpoint.pt", NEW, keep=True)
    found = (folder / "checkpoint.pt.previous").read_bytes()
    assert found != OLDER, "<name>.previous is still the older one: it was not kept"
    assert found == OLD, "with keep, <name>.previous is not the file before"
    left = len(list(folder.iterdir()))
    assert left == 2, f"{left} files afterwards, not two: the file and its previous one"


def test_without_keep_there_is_no_previous_file(impl, tmp_path):
    path = tmp_path / "checkpoint.pt"
    for content in (OLD, NEW):
        impl.extra.write_atomically(path, content)
        found = (tmp_path / "checkpoint.pt.previous").exists()
        assert not found, "<name>.previous is made without keep"


def test_what_a_kill_leaves_beside_is_known_to_remove_temporary(impl, tmp_path):
    ours = {"checkpoint.pt", "checkpoint.pt.previous"}
    for keep in (False, True):
        for disk, folder, _ in states(impl, tmp_path, {"checkpoint.pt": OLD}, keep,
                                      crash=1):  # fmt: skip
            assert disk.foreign is None, (
                "the file is written in another folder and renamed from there: that "
                "may be another disk, where a rename is a copy or an error"
            )
            impl.extra.remove_temporary(folder)
            left = sorted({p.name for p in folder.iterdir()} - ours)
            assert not left, (
                f"a kill ({disk.where}) leaves {left[0]}, which remove_temporary does "
                "not know: its name is <name>.tmp.<digits>"
            )


def test_a_full_disk_is_an_error_and_leaves_no_rubbish(impl, tmp_path):
    for keep in (False, True):
        for disk, folder, error in states(impl, tmp_path, {"checkpoint.pt": OLD}, keep,
                                          full=1):  # fmt: skip
            path = folder / "checkpoint.pt"
            found = path.read_bytes() if path.exists() else None
            where = getattr(disk, "where", "")
            if error is None:
                assert found == NEW, (
                    f"the disk is full ({where}) and it returns as if all was well: "
                    "the error is swallowed, the file is the old one"
                )
            else:
                assert found in (OLD, NEW), (
                    f"the disk is full ({where}) and the old file is gone or cut"
                )
                assert path.name in str(error), (
                    f"the disk is full ({where}), and the error does not name the "
                    f"file: {error}"
                )
            left = sorted(p.name for p in folder.iterdir() if ".tmp." in p.name)
            assert not left, (
                f"the disk is full ({where}) and {left[0]} is left: it takes the space "
                "that the next try needs"
            )


def test_the_new_name_is_on_the_disk_when_it_returns(impl, tmp_path):
    if os.name == "nt":  # Windows opens no folders
        return
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(OLD)
    disk = Disk(impl, tmp_path)
    error = write(disk, path, NEW, True)
    assert error is None, f"it ends with {error!r}"
    renames = [i for i, x in enumerate(disk.done) if x.endswith("to checkpoint.pt")]
    synced = [i for i, x in enumerate(disk.done) if x == "sync the folder"]
    assert renames, f"no file gets the name by a rename: {', '.join(disk.done)}"
    assert synced and synced[-1] > renames[-1], (
        "the folder is not synced after the rename: after a power cut the old file may "
        "be back, though it was reported as saved (sync_folder does it)"
    )


# ---- Reading -----------------------------------------------------------------------


def contents(rng):
    weights = torch.randn(3, 5, generator=rng)
    return {"step": 7, "models": {"student": weights}, "note": {"base": [1.5, None]}}


def head(body):
    return f"sdft {hashlib.sha256(body).hexdigest()}\n".encode()


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def refuse(impl, path, data, loaded, where):
    """read_checkpoint must raise ValueError, which names the file."""
    path.write_bytes(data)
    try:
        impl.extra.read_checkpoint(path)
    except NotImplementedError:
        raise
    except ValueError as error:
        assert path.name in str(error), f"the error for {where} names no file: {error}"
    except Exception as error:
        raise AssertionError(
            f"{where} ends with {type(error).__name__}, not with ValueError, which the "
            "program prints as an error; anything else is a traceback"
        ) from None
    else:
        raise AssertionError(loaded)
    found = path.read_bytes() if path.exists() else None
    assert found == data, "read_checkpoint changes or deletes the file"


def test_it_reads_what_was_written(impl, rng, tmp_path):
    content, path = contents(rng), tmp_path / "checkpoint.pt"
    body = saved(content)
    path.write_bytes(head(body) + body)
    for _ in range(2):
        found = impl.extra.read_checkpoint(path)
        assert isinstance(found, dict), f"it gives a {type(found).__name__}, no dict"
        assert list(found) == list(content), f"it gives {list(found)}"
        same = torch.equal(found["models"]["student"], content["models"]["student"])
        assert same and found["note"] == content["note"], "its values are others"
        impl.extra.write_checkpoint(path, content)  # that one can be read, too


def test_tensors_of_a_gpu_come_to_the_cpu(impl, rng, tmp_path):
    content, path = contents(rng), tmp_path / "checkpoint.pt"
    tag, torch.serialization.location_tag = torch.serialization.location_tag, gpu
    try:
        body = saved(content)
    finally:
        torch.serialization.location_tag = tag
    path.write_bytes(head(body) + body)
    try:
        found = impl.extra.read_checkpoint(path)["models"]["student"]
    except ValueError as error:
        raise AssertionError(
            f"a file that was saved on a GPU is refused: {error}. Tensors come to the "
            "CPU (map_location)"
        ) from None
    where = found.device.type
    assert where == "cpu", f"a tensor comes to {where}. Tensors come to the CPU"
    same = torch.equal(found, content["models"]["student"])
    assert same, "its values are others when it was saved on a GPU"


def gpu(storage):
    """What torch.save writes down about a tensor of the first GPU."""
    return "cuda:0"


def test_a_file_that_was_cut_is_refused(impl, rng, tmp_path):
    body = saved(contents(rng))
    data = head(body) + body
    start = len(head(body))
    places = torch.randint(start, len(data), (12,), generator=rng).tolist()
    for n in (0, 3, 20, start - 1, start, len(data) - 1, *places):
        refuse(impl, tmp_path / "checkpoint.pt", data[:n],
               f"it loads a file that was cut to {n} of {len(data)} bytes",
               f"a file that was cut to {n} of {len(data)} bytes")  # fmt: skip
    refuse(impl, tmp_path / "checkpoint.pt", data + b"\0",
           "it loads a file with a byte too many at its end",
           "a file with a byte too many")  # fmt: skip


def test_one_flipped_bit_is_refused(impl, rng, tmp_path):
    body = saved(contents(rng))
    data, start = head(body) + body, len(head(body))
    places = torch.randint(start, len(data), (24,), generator=rng).tolist()
    weights = data.index(contents_bytes(body))
    for n in (1, 4, 6, 30, start - 2, weights, weights + 20, *places):
        flipped = bytearray(data)
        flipped[n] ^= 1
        refuse(impl, tmp_path / "checkpoint.pt", bytes(flipped),
               f"it loads a file with a flipped bit in byte {n}, of {len(data)}: "
               "torch.load checks no sum; compare the SHA-256 of all bytes behind the "
               "first line", f"a flipped bit in byte {n}")  # fmt: skip


def contents_bytes(body):
    """Some bytes of the weights in a file of torch.save."""
    loaded = torch.load(io.BytesIO(body), weights_only=True)
    return loaded["models"]["student"].numpy().tobytes()[:16]


class Evil:
    """Its pickle runs Python."""

    def __init__(self, marker):
        self.code = f"open({str(marker)!r}, 'w').close()"

    def __reduce__(self):
        return exec, (self.code,)


def test_a_file_that_would_run_code_is_refused_and_runs_nothing(impl, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "checkpoint.pt"
    content = {"step": 1, "models": Evil(marker)}
    for body in (saved(content), pickle.dumps(content, 2)):
        for data in (head(body) + body, body):
            try:
                refuse(impl, path, data, "it loads a file that would run code",
                       "a file that would run code")  # fmt: skip
            finally:
                ran = marker.exists()
                marker.unlink(missing_ok=True)
                assert not ran, (
                    "a checkpoint from somebody else ran Python code while it was "
                    "read: weights_only=True, and nothing else that unpickles"
                )


def test_a_file_of_another_kind_is_refused(impl, rng, tmp_path):
    path, body = tmp_path / "checkpoint.pt", saved(contents(rng))
    refuse(impl, path, body, "it loads a file without a checksum",
           "a file without a checksum")  # fmt: skip
    other = head(body).replace(b"sdft", b"tfds") + body
    refuse(impl, path, other, "it loads a file whose first line is of another program",
           "another first line")  # fmt: skip
    body = b"these are no tensors"
    refuse(impl, path, head(body) + body, "it loads a text", "a text with a right sum")
    body = saved(contents(rng))
    wrong = head(body + b"x") + body
    refuse(impl, path, wrong, "it loads a file whose checksum is that of another",
           "another checksum")  # fmt: skip
