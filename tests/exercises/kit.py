"""What the scripts of this folder share: exercises, stubs, a student's code, grading.

An exercise is two files: eNN.py says what is asked (an Exercise) and how people go
wrong; test_eNN_*.py is its grader. What a student writes is put over the project's own
modules, one exercise at a time: an error in one exercise takes no points of another.
"""

import ast
import contextlib
import functools
import hashlib
import importlib
import inspect
import os
import re
import sys
import tempfile
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py: read by torch

import torch
from variants import FILES, HERE, ROOT, KitError, Modules, change, source

for path in (ROOT, ROOT / "tests", HERE):  # the project, oracles.py, eNN.py
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))

# ---- What an exercise is -----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Exercise:
    id: str  # "e05"
    functions: tuple  # of "sft.py compute_loss" or "model.py Class.method"
    title: str
    goal: str  # one sentence
    paper: str  # section and equation
    difficulty: int  # 1 to 5
    minutes: int  # for one who knows PyTorch
    points: int
    run_time: str  # of the grader, and of what it asks to run
    sheet: str  # what to write; what to look at when it runs
    hints: tuple  # direction, plan, almost the code
    # (name, changes, part of the message). changes: ((old, new), ...), each old text
    # exactly once in the functions; or the source of whole functions, as a student
    # would write them
    mutants: tuple
    rights: tuple  # (name, source): right, and not as the project has it
    wire: tuple = ()  # (file, old, new): puts the function into the training job
    extra: bool = False  # for those who are done

    @property
    def files(self):
        return list(dict.fromkeys(name.split()[0] for name in self.functions))

    def names_in(self, file):
        """The functions of this exercise that stand in a file."""
        pairs = [name.split() for name in self.functions]
        return [name for where, name in pairs if where == file]

    @property
    def hint_line(self):
        return f"hint: python tests/exercises/make.py {self.id} --hint 1"


@functools.cache
def exercises():
    """id -> Exercise, of every eNN.py in this folder."""
    names = sorted(path.stem for path in HERE.glob("e[0-9][0-9].py"))
    return {name: importlib.import_module(name).EXERCISE for name in names}


def exercise(name):
    """By its id; "E05", "e5" and "5" are e05, too."""
    if match := re.fullmatch(r"e?(\d{1,2})", name.strip().lower()):
        name = f"e{int(match[1]):02d}"
    if name not in exercises():
        raise KitError(f"no exercise {name!r}", f"one of {', '.join(exercises())}")
    return exercises()[name]


def exercise_of(module_name):
    """The exercise that a test file grades, by the file's name; None for other files"""
    parts = module_name.rpartition(".")[2].split("_")
    return exercises().get(parts[1]) if parts[0] == "test" and parts[1:] else None


# ---- Python's source, by its syntax tree -------------------------------------------


@functools.lru_cache(maxsize=16)  # a tree of model.py is 16,000 objects
def parse(text):
    """The syntax tree of a text; it is shared, so nobody may change it."""
    return ast.parse(text)


def find(tree, dotted):
    """The node of a function, "name" or "Class.name", or None."""
    *outer, name = dotted.split(".")
    body = tree.body
    for each in outer:
        classes = [n for n in body if isinstance(n, ast.ClassDef) and n.name == each]
        body = classes[0].body if classes else []
    found = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == name]
    return found[-1] if found else None


def first_line(node):
    """Index of its first line, decorators included."""
    return min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1


def function_source(text, dotted):
    """The lines of a function, or None."""
    node = find(parse(text), dotted)
    if node is None:
        return None
    return "".join(text.splitlines(True)[first_line(node) : node.end_lineno])


def replace_function(text, dotted, new):
    node = find(parse(text), dotted)
    lines = text.splitlines(True)
    return "".join([*lines[: first_line(node)], new, *lines[node.end_lineno :]])


def empty_function(text, dotted, message):
    """The text with the function's body gone: its signature, docstring and decorators
    stay, and every line around it."""
    node, lines = find(parse(text), dotted), text.splitlines(True)
    first = node.body[0]
    start = first.lineno - 1
    if ast.get_docstring(node) is not None:
        start = first.end_lineno
    if start < node.lineno:
        raise KitError(f"{dotted} has its body on its first line", "use two lines")
    body = f'{" " * first.col_offset}raise NotImplementedError("{message}")\n'
    return "".join([*lines[:start], body, *lines[node.end_lineno :]])


def shape_of(node):
    """A function as text, without docstring, comments and layout."""
    node = ast.parse(ast.unparse(node)).body[0]
    if ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    return ast.dump(node)


def is_stub(node):
    """Does it still hold our NotImplementedError, and nothing else?"""
    body = node.body[ast.get_docstring(node) is not None :]
    call = body[0].exc if len(body) == 1 and isinstance(body[0], ast.Raise) else None
    name = getattr(getattr(call, "func", call), "id", "")
    return name == "NotImplementedError"


def bound_names(node):
    """The names that a statement of a module makes."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(a.asname or a.name).split(".")[0] for a in node.names}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)
                and isinstance(n.ctx, ast.Store)}  # fmt: skip
    return set()


# ---- A student's code over the project's -------------------------------------------


class Work:
    """What a student has written: {file name: (path, text)} of a folder, or of texts.

    Of a file, the functions of an exercise are taken, and what they may need that the
    project's file does not have: new functions, classes, imports and constants. All
    else in it, and every statement that only does something, is left where it is.
    """

    def __init__(self, files):
        self.files, self.trees = {}, {}
        for file, (path, text) in files.items():
            try:
                tree = parse(text)
            except SyntaxError as error:
                at = f"{path}:{error.lineno}:{error.offset}"
                line = f"line {error.lineno}, `{(error.text or '').strip()}`"
                raise KitError(
                    f"{at}: {error.msg}",
                    f"Python cannot read {line}, or the line above: mend it and run "
                    "again",
                ) from None
            self.files[file], self.trees[file] = (path, text), tree

    @classmethod
    def of_folder(cls, folder, ids="e05"):
        """ids: of the exercises that are asked for, for the hint."""
        folder = Path(folder)
        if not folder.is_dir():
            raise KitError(
                f"{folder}: no such folder",
                f"python tests/exercises/make.py {ids} --to {folder} makes it",
            )
        found = [folder / file for file in FILES if (folder / file).is_file()]
        return cls({p.name: (str(p), p.read_text(encoding="utf-8")) for p in found})

    def state_of(self, file, name):
        """Of one function: "missing", "stub", "project" (its own text) or "written"."""
        tree = self.trees.get(file)
        node = find(tree, name) if tree else None
        if node is None:
            return "missing"
        if is_stub(node):
            return "stub"
        same = shape_of(node) == shape_of(find(parse(source(file)), name))
        return "project" if same else "written"

    def is_empty(self, ex):
        """Is each of its functions a stub or missing?"""
        states = {self.state_of(*function.split()) for function in ex.functions}
        return states <= {"stub", "missing"}

    def state(self, ex):
        """The same of an exercise: "written" if at least one of its functions is and
        none is missing or a stub."""
        pairs = [function.split() for function in ex.functions]
        states = [self.state_of(*pair) for pair in pairs]
        order = ("missing", "stub", "written", "project")
        return next(state for state in order if state in states)

    def taken(self, exs, file):
        """The statements that are taken from a file, and (class name, functions)."""
        if file not in self.trees:
            return [], {}
        has = set().union(*(bound_names(n) for n in parse(source(file)).body))
        wanted = [name for ex in exs for name in ex.names_in(file)]
        methods = {}
        for name in wanted:
            if "." in name and (node := find(self.trees[file], name)) is not None:
                methods.setdefault(name.split(".")[0], []).append(node)
        # names that any exercise asks for, and this one does not, are not a helper
        asked = {name for ex in exercises().values() for name in ex.names_in(file)}
        statements = []
        for node in self.trees[file].body:
            names = bound_names(node)
            if names & set(wanted) or (names - has and not names & asked):
                statements.append(node)
        return statements, methods

    def put_over(self, exs, file, module):
        """Run what is taken from a file in the module, at the student's own lines."""
        statements, methods = self.taken(exs, file)
        path = self.files[file][0] if file in self.files else file
        namespace = vars(module)

        def run(nodes):
            tree = ast.Module(nodes, type_ignores=[])
            exec(compile(tree, path, "exec"), namespace)

        run(statements)
        for name, nodes in methods.items():
            kept = namespace[name]
            for node in nodes:
                run([node])
                function = namespace.pop(node.name)
                setattr(kept, node.name, function)

    def modules(self, exs, changes=()):
        """The project's modules with this work in them, for one or more exercises."""
        exs = [exs] if isinstance(exs, Exercise) else list(exs)
        after = functools.partial(self.put_over, exs)
        return Modules(changes, after=after)


def work_of(ex, changes):
    """A mutant or a right solution as a student's work. changes: see Exercise."""
    if isinstance(changes, str):
        changes = {ex.files[0]: changes}
    if isinstance(changes, dict):
        return Work({f: (f"<{f} of {ex.id}>", text) for f, text in changes.items()})
    texts = {file: source(file) for file in ex.files}
    for old, new in changes:
        places = [
            (file, name) for file in ex.files for name in ex.names_in(file)
            if old in function_source(texts[file], name)
        ]  # fmt: skip
        if len(places) != 1:
            where = ", ".join(ex.functions)
            raise ValueError(f"{ex.id}: in {len(places)} of {where}, not one:\n{old}")
        ((file, name),) = places
        part = function_source(texts[file], name)
        new = change(part, old, new, f"{ex.id}: {name}")
        texts[file] = replace_function(texts[file], name, new)
    return Work({f: (f"<{f} of {ex.id}>", text) for f, text in texts.items()})


# ---- Grading -----------------------------------------------------------------------


@functools.cache
def graders(ex):
    """The test functions of an exercise, in their order: {name: function}."""
    paths = list(HERE.glob(f"test_{ex.id}_*.py"))
    assert len(paths) == 1, f"{ex.id}: one grader test_{ex.id}_*.py, found {paths}"
    module = importlib.import_module(paths[0].stem)
    return {k: v for k, v in vars(module).items() if k.startswith("test_")}


def make_rng(seed, name):
    """A generator of its own for each test: --seed N makes all inputs fresh."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@contextlib.contextmanager
def default_dtype(module):
    """float64 for new tensors if a grader's module says FLOAT64 = True."""
    before = torch.get_default_dtype()
    if getattr(module, "FLOAT64", False):
        torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run_test(test, impl, seed, folder):
    """Call one grader with what it asks for by name: impl, rng, seed, tmp_path."""
    has = {"impl": lambda: impl, "rng": lambda: make_rng(seed, test.__name__),
           "seed": lambda: seed, "tmp_path": lambda: Path(folder)}  # fmt: skip
    with default_dtype(sys.modules[test.__module__]):
        test(**{name: has[name]() for name in inspect.signature(test).parameters})


def results(ex, impl, seed=0):
    """(test name, None or the exception that it ended with), one after the other."""
    for name, test in graders(ex).items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                run_test(test, impl, seed, folder)
                yield name, None
            except (Exception, SystemExit) as error:
                yield name, error


def explain(error, ex):
    """What a student should read of a failure, without the hint line."""
    if isinstance(error, AssertionError):
        text = str(error).split("\nassert ")[0]  # pytest adds what it saw
        lines = [textwrap.fill(line, 88) for line in text.splitlines()]
        return "\n".join(lines) or "an assert without a message"
    kind = type(error).__name__
    if isinstance(error, NotImplementedError) and str(error).startswith(f"{ex.id}:"):
        return f"not written yet: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = {str(path / file) for file, path in FILES.items()} | {torch.__file__}
    theirs = [
        f for f in frames
        if Path(f.filename).name in FILES or f.filename.startswith("<")
    ]  # fmt: skip
    lines = [
        f"  {f.filename}:{f.lineno}, in {f.name}: {f.line or ''}".rstrip()
        for f in theirs if f.filename not in ours
    ] or [f"  {f.filename}:{f.lineno}, in {f.name}: {f.line}" for f in frames[-2:]]
    if isinstance(error, RuntimeError) and re.search(
        r"\bdouble\b.*\bfloat\b|\bfloat\b.*\bdouble\b", str(error), re.I | re.S
    ):
        lines.append(f"float32 meets float64. {KEEP}")
    return "\n".join([f"it ended with {kind}: {error}", *lines])


# ---- What graders use --------------------------------------------------------------


def small_model(impl, **changes):
    """oracles.make_model with the GPT of the modules under test, in float64."""
    oracles = importlib.import_module("oracles")
    truth = oracles.make_model(**changes)
    config = impl.model.GPTConfig(**vars(truth.config))
    model = impl.model.GPT(config).double()
    model.dtype = torch.float64
    model.load_state_dict(truth.state_dict())
    return model


def weights(model):
    """{name: a copy} of a model's parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def words(impl, rng, n):
    """A text of n nouns of the tiny world."""
    places = torch.randint(len(impl.data.NOUNS), (n,), generator=rng).tolist()
    return " ".join(impl.data.NOUNS[i] for i in places)


def by_row(value, student, teacher):
    """value(log p_student, log p_teacher), two lists, of each row of logits (..., V):
    float64 (...)."""
    oracles, V = importlib.import_module("oracles"), student.size(-1)
    both = (x.reshape(-1, V).tolist() for x in (student, teacher))
    found = [value(*map(oracles.log_softmax, pair)) for pair in zip(*both, strict=True)]
    return torch.tensor(found, dtype=torch.float64).view(student.shape[:-1])


def mean(values, mask, n=None):
    """Of (B, R): over the tokens of a response, then over n responses (None: B), as a
    loop."""
    total = 0.0
    for row, counts in zip(values.tolist(), mask.tolist(), strict=True):
        taken = [x for x, c in zip(row, counts, strict=True) if c]
        total += sum(taken) / len(taken) if taken else 0.0
    return torch.tensor(total / (n or len(mask)), dtype=torch.float64)


def one_number(loss):
    """The loss, if it is a tensor of shape ()."""
    assert not isinstance(loss, float | int), (
        f"the loss is {loss!r}, a Python number, which has no gradient: no .item(), "
        "and where does a sum start that found no token?"
    )
    assert torch.is_tensor(loss) and loss.shape == (), (
        f"the loss is one number, a tensor of shape (); yours is "
        f"{tuple(loss.shape) if torch.is_tensor(loss) else loss!r}"
    )
    return loss


@contextlib.contextmanager
def unchanged(function, **given):
    """Assert that these tensors are in the end what they were."""
    before = {name: x.detach().clone() for name, x in given.items()}
    yield
    for name, x in given.items():
        same = torch.equal(x.nan_to_num(-1), before[name].nan_to_num(-1))
        assert same, f"{function} changes {name}: work on a copy"


def is_close(a, b, tolerance):
    a, b = torch.as_tensor(a).detach().double(), torch.as_tensor(b).detach().double()
    return a.shape == b.shape and torch.allclose(a, b, tolerance, tolerance, True)


def compare(yours, truth, mistakes=(), what="the result", tolerance=1e-9):
    """Assert that yours is the truth; if not, say which mistake it is.

    mistakes: {message: the value that this mistake gives}, tried in order, or a
    function that makes this dict when it is needed. Those that give the truth itself
    for these inputs are not tried.
    """
    assert torch.is_tensor(yours), f"{what} is a {type(yours).__name__}, not a tensor"
    truth = torch.as_tensor(truth)
    assert yours.shape == truth.shape, (
        f"{what} has shape {tuple(yours.shape)}, it should be {tuple(truth.shape)}"
    )
    assert yours.dtype.is_floating_point == truth.dtype.is_floating_point, (
        f"{what} is {yours.dtype}, it should be {truth.dtype}"
    )
    if is_close(yours, truth, tolerance):
        return
    mistakes = mistakes() if callable(mistakes) else dict(mistakes)
    for message, value in mistakes.items():
        value = torch.as_tensor(value)
        same = value.shape == truth.shape and is_close(value, truth, tolerance)
        assert same or not is_close(yours, value, max(tolerance, 1e-7)), message
    if not yours.isfinite().all() and truth.isfinite().all():
        raise AssertionError(f"{what} is not finite: {short(yours)}")
    far = (yours.detach().double() - truth.double()).abs().max().item()
    rounded = tolerance <= 1e-7 and rounds_to_float32(yours, truth)
    digits = 10 if rounded else 6
    text = f"{what} is {short(yours, digits)}, it should be {short(truth, digits)}: "
    if rounded:
        wide = not torch.equal(yours.double(), yours.float().double())
        more = ". Or is a small number added, such as 1e-8?" if wide else ""
        raise AssertionError(f"{text}up to {far:.2g} away. {FLOAT32}{more}")
    raise AssertionError(f"{text}up to {far:.2g} away")


KEEP = (
    "The grader gives you float64. Keep the dtype you are given (no .float(), no "
    "torch.zeros without dtype=)"
)
FLOAT32 = f"It is right up to float32 rounding. {KEEP}"


def rounds_to_float32(yours, truth):
    """Is the difference, relative to the largest number, one that float32 makes?"""
    yours, truth = yours.detach().double(), truth.detach().double()
    far = (yours - truth).abs().max()
    return yours.numel() > 0 and bool(0 < far < 1e-5 * truth.abs().max())


def short(x, digits=6):
    x = torch.as_tensor(x).detach()
    if x.numel() == 1:
        return f"{x.item():.{digits}g}"
    values = ", ".join(f"{v:.{max(4, digits - 2)}g}" for v in x.flatten()[:6].tolist())
    return f"[{values}{', ...' if x.numel() > 6 else ''}]"
