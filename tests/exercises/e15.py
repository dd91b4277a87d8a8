"""e15: a checkpoint that survives. Grader: test_e15_checkpoint.py"""

from kit import Exercise

SHEET = """
A run of hours is worth what its checkpoint is worth. A kill in the middle of a save, a
power cut, a full disk, one bad bit, a file from a stranger: write the two functions of
extra.py between a dict and its file.

1. write_atomically(path, content, keep=False): the bytes `content` become the file
   `path`. Whenever the process dies, at `path` there is the old file or the new one,
   whole; and after a power cut, too, when what was not synced is lost. So: write a file
   beside the target (its name <name>.tmp.<digits>, which remove_temporary tidies up),
   bring it to the disk, give it the name, bring the name to the disk (sync_folder).
   keep: the file that is replaced stays as <name>.previous (keep_previous); from then
   on there is a <name>.previous at every moment. (There may be no file to keep yet.)
   If something raises OSError, such as a full disk: what was there stays, your
   temporary file goes (keep_previous removes its own), and an OSError that names the
   path is raised.
2. read_checkpoint(path): the dict of write_checkpoint. Its file is one line, "sdft ",
   the SHA-256 of all other bytes in hex, a newline, then the bytes of torch.save.
   Tensors come to the CPU. ValueError, which names the path, if anything about the file
   is not as it was written: cut, a flipped bit, another kind of file. Nothing in a file
   is ever executed.

train.write_file and train.read_checkpoint are not there while it is graded.
sync_folder and keep_previous come with the file; os, io, hashlib and shutil are
imported. (write_checkpoint and remove_temporary stay in tests/exercises/extra.py.)
Nothing is killed when it is graded: each thing that you do to a file (open, write,
os.fsync, os.replace, os.unlink, ...) is watched, and the process "dies" before, in the
middle and after each.

What to look at when it runs: python tests/exercises/run.py mine --quick --method sft
saves its checkpoints with your functions; kill it (kill -9) while it runs, and go on
with --resume. Then torch.save a tensor, change one byte in the middle of the file and
torch.load it: did it complain? At last read write_file and read_checkpoint of train.py.
They keep no previous file and write no sum of their own: what do they do without, and
where does read_checkpoint find a sum to check?
"""

HINTS = (
    """
Direction. When is the old file gone for good, and what must have happened to the new
one by then? A name and its bytes reach the disk each in their own time. Of
reading: who checks that the bytes are those that were written, before anything is made
of them?
""",
    """
Plan. with open(temporary, "wb"): write, flush (out of this process), os.fsync(its
fileno) (onto the disk). Then keep_previous if asked, os.replace(temporary, path),
sync_folder(path.parent). Around it try/except OSError: unlink what is left, raise
OSError with the path. Reading: read_bytes, partition at the first newline, compare the
whole first line with what it should be; then torch.load of io.BytesIO with
weights_only=True, any exception of it turned into ValueError.
""",
    """
Almost the code.
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            ...  # three lines
        if keep and path.exists():
            keep_previous(path)
        os.replace(...)
        ...
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} not written: {error.strerror}") from None

    head, _, content = path.read_bytes().partition(b"\\n")
    if head != f"sdft {hashlib.sha256(content).hexdigest()}".encode():
        raise ...
""",
)

SYNC = "            os.fsync(file.fileno())\n"
FLUSH = "            file.flush()\n"
WRITE = "            file.write(content)\n"
KEEP = "        if keep and path.exists():\n            keep_previous(path)\n"
RENAME = "        os.replace(temporary, path)\n"
FOLDER = "        sync_folder(path.parent)\n"
NAME = 'path.with_name(f"{path.name}.tmp.{os.getpid()}")'
SUM = 'head != f"sdft {hashlib.sha256(content).hexdigest()}".encode()'
LOAD = 'torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)'

MUTANTS = (
    ("in place", """
def write_atomically(path, content, keep=False):
    if keep and path.exists():
        keep_previous(path)
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)
""", "neither the old file nor the new one"),
    ("write_bytes", """
def write_atomically(path, content, keep=False):
    if keep and path.exists():
        keep_previous(path)
    path.write_bytes(content)
""", "neither the old file nor the new one"),
    ("puts the old one back", """
def write_atomically(path, content, keep=False):
    old = path.read_bytes() if path.exists() else None
    try:
        path.write_bytes(content)
    except BaseException:
        path.write_bytes(old)
        raise
""", "neither the old file nor the new one"),
    ("no fsync", ((SYNC, ""),), "before its bytes"),
    ("fsync before flush", ((WRITE + FLUSH + SYNC, WRITE + SYNC + FLUSH),),
     "flush first"),
    ("fsync without flush", ((FLUSH, ""),), "flush first"),
    ("fsync after the rename", ((SYNC, ""), (RENAME, RENAME + """\
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
""")), "before its bytes"),
    ("renamed while it is open", (
        (RENAME, ""), (FLUSH + SYNC, f"    {RENAME}")),
     "before all bytes had left"),
    ("deletes first", ((RENAME, "        path.unlink(missing_ok=True)\n" + RENAME),),
     "there is no checkpoint at all"),
    ("the old one moves away", (
        (KEEP, "        if keep and path.exists():\n            os.replace(path, "
         'path.with_name(path.name + ".previous"))\n'),),
     "there is no checkpoint at all"),
    ("a copy, not a rename", ((RENAME, "        shutil.copyfile(temporary, path)\n"
                               "        temporary.unlink()\n"),),
     "neither the old file nor the new one"),
    ("folder not synced", ((FOLDER, ""),), "folder is not synced"),
    ("folder synced before", ((RENAME + FOLDER, FOLDER + RENAME),),
     "folder is not synced"),
    ("another folder", ((NAME, 'path.parent.parent / f"{path.name}.tmp.1"'),),
     "another folder"),
    ("a name nobody knows", ((NAME, 'path.with_suffix(".new")'),),
     "remove_temporary does not know"),
    ("kept too late", ((KEEP, ""), (RENAME, RENAME + KEEP)),
     "is the new content"),
    ("the previous one in place", (
        ("keep_previous(path)", 'shutil.copyfile(path, path.with_name('
         'path.name + ".previous"))'),), "link or copy, then rename"),
    ("the previous one goes first", (
        ("keep_previous(path)", """(
                path.with_name(path.name + ".previous").unlink(missing_ok=True),
                os.link(path, path.with_name(path.name + ".previous")))"""),),
     "there is no <name>.previous"),
    ("no file yet", (("if keep and path.exists()", "if keep"),),
     "into an empty folder"),
    ("tensors go where they were", ((LOAD, LOAD.replace('map_location="cpu", ', "")),),
     "Tensors come to the CPU"),
    ("never kept", ((KEEP, ""),), "not kept"),
    ("always kept", (("if keep and path", "if path"),), "made without keep"),
    ("error swallowed", (
        ("    except OSError as error:\n",
         "    except OSError as error:\n        return print(error)\n"),), "swallowed"),
    ("rubbish stays", (("        temporary.unlink(missing_ok=True)\n", ""),),
     "takes the space"),
    ("the error names nothing", (('f"{path} not written: ', 'f"'),),
     "does not name the file"),
    ("no checksum", ((SUM, "False"),), "torch.load checks no sum"),
    ("part of the checksum", ((SUM, "head[:9] != f\"sdft {hashlib.sha256(content)"
                               ".hexdigest()}\".encode()[:9]"),),
     "flipped bit in byte"),
    ("sum of the first bytes", (
        (SUM, 'not head.startswith(b"sdft ") or len(content) < 900'),),
     "flipped bit in byte"),
    ("pickle runs", ((LOAD, LOAD.replace("True", "False")),), "ran Python code"),
    ("pickle runs if all else fails", (
        ("    except Exception as error:", """\
    except __import__("pickle").UnpicklingError:
        return torch.load(io.BytesIO(content), weights_only=False)
    except Exception as error:"""),), "ran Python code"),
    ("loads before it compares", (
        ("    head, _, content =", """\
    torch.load(io.BytesIO(path.read_bytes().partition(b"\\n")[2]), weights_only=False)
    head, _, content ="""),), "ran Python code"),
    ("another exception", (("    except Exception as error:", "    except KeyError as "
                            "error:"),), "not with ValueError"),
    ("an assert", ((f"    if {SUM}:\n", f"    assert not {SUM}\n    if False:\n"),),
     "not with ValueError"),
    ("any first word", ((SUM, 'head[5:] != hashlib.sha256(content).hexdigest()'
                         '.encode()'),), "another program"),
    ("deletes what is broken", ((f"    if {SUM}:\n", f"    if {SUM}:\n        path"
                                 ".rename(path.with_suffix('.broken'))\n        "
                                 "path.touch()\n"),), "changes or deletes"),
    ("the error names no file", (('f"{path}: {path.stat().st_size} bytes, checksum',
                                  'f"bytes, checksum'),), "names no file"),
)  # fmt: skip

READ = '''
def read_checkpoint(path):
    data = path.read_bytes()
    line, newline, rest = data[:69], data[69:70], data[70:]
    sum_ = hashlib.sha256()
    sum_.update(memoryview(data)[70:])
    if newline != b"\\n" or line != b"sdft " + sum_.hexdigest().encode():
        raise ValueError(f"{path} is broken")
    try:
        found = torch.load(io.BytesIO(rest), map_location="cpu", weights_only=True)
    except BaseException as error:
        raise ValueError(f"cannot load {path}: {error!r}") from error
    return found
'''

RIGHTS = (
    (
        "os.open and os.write; a finally; a header of known length",
        f'''
import time

def write_atomically(path, content, keep=False):
    temporary = path.parent / f"{{path.name}}.tmp.{{time.monotonic_ns()}}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            left = memoryview(content)
            while len(left):
                left = left[os.write(fd, left):]
            os.fsync(fd)
        finally:
            os.close(fd)
        if keep and path.exists():
            keep_previous(path)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {{error.strerror}}", str(path))
    finally:
        for name in (temporary, *path.parent.glob("*.tmp.*")):
            try:
                os.unlink(name)
            except FileNotFoundError:
                pass
{READ}''',
    ),
    (
        "Path.write_bytes, a second open to sync, a copy for the previous file",
        '''
def synced(path, content):
    path.write_bytes(content)
    with path.open("rb+") as file:
        os.fsync(file)

def write_atomically(path, content, keep=False):
    new = path.with_name(path.name + ".tmp.1")
    kept = path.with_name(path.name + ".tmp.2")
    try:
        with open(new, "wb", buffering=0) as file:
            file.write(content)
            os.fsync(file)
        if keep and path.exists():
            synced(kept, path.read_bytes())
            kept.replace(path.with_name(path.name + ".previous"))
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        kept.unlink(missing_ok=True)
        raise OSError(f"{path}: {error}") from error
    sync_folder(path.parent)

def read_checkpoint(path):
    with open(path, "rb") as file:
        word, _, expected = file.readline().rstrip(b"\\n").partition(b" ")
        content = file.read()
    if word != b"sdft":
        raise ValueError(f"{path}: not a checkpoint")
    if expected != hashlib.sha256(content).hexdigest().encode("ascii"):
        raise ValueError(f"{path}: damaged")
    try:
        return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception:
        raise ValueError(f"{path}: not ours")
''',
    ),
)

EXERCISE = Exercise(
    id="e15",
    functions=("extra.py write_atomically", "extra.py read_checkpoint"),
    title="A checkpoint that survives",
    goal="Save so that no kill loses a run, load so that no broken file passes.",
    paper="none: what makes three days of arXiv 2601.19897's runs worth starting",
    difficulty=4,
    minutes=60,
    points=8,
    run_time="in 2 seconds",
    sheet=SHEET,
    hints=HINTS,
    mutants=MUTANTS,
    rights=RIGHTS,
    not_with=("train.write_file", "train.read_checkpoint"),
    wire=(
        (
            "train.py",
            "    write_file(path, lambda file: torch.save(content, file))\n",
            """\
    if path.name == "checkpoint.pt":  # not the base model, which others read, too
        import extra

        return extra.write_checkpoint(path, content)
    write_file(path, lambda file: torch.save(content, file))
""",
        ),
        (
            "train.py",
            "    try:\n        with zipfile.ZipFile(path) as file:\n",
            """\
    if path.name == "checkpoint.pt":
        import extra

        return extra.read_checkpoint(path)
    try:
        with zipfile.ZipFile(path) as file:
""",
        ),
    ),
)
