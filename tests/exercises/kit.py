"""What the scripts of this folder share: exercises, stubs, a student's code, grading.

An exercise is two files: eNN.py says what is asked (an Exercise) and how people go
wrong; test_eNN_*.py is its grader. What a student writes is put over the project's own
modules, one exercise at a time: an error in one exercise takes no points of another.
"""

import ast
import copy
import difflib
import functools
import hashlib
import importlib
import inspect
import io
import os
import re
import sys
import textwrap
import tokenize
import traceback
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py: read by torch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from variants import FILES, HERE, ROOT, KitError, Modules, source

# eNN.py, oracles.py, the project
sys.path[:0] = [str(HERE), str(ROOT / "tests"), str(ROOT)]

import oracles  # noqa: E402

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
    # what is absent while it is graded: "model.kl_reference", "torch._log_softmax"
    not_with: tuple = ()
    changes: tuple = ()  # arguments that the function is to change
    extra: bool = False  # for those who are done

    @property
    def pairs(self):
        """(file, name) of each function."""
        return [tuple(function.split()) for function in self.functions]

    @property
    def files(self):
        return list(dict.fromkeys(file for file, _ in self.pairs))

    def names_in(self, file):
        """The functions of this exercise that stand in a file."""
        return [name for where, name in self.pairs if where == file]

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


# ---- Python's source, by its syntax tree -------------------------------------------


@functools.lru_cache(maxsize=16)  # a tree of model.py is 16,000 objects
def parse(text):
    """The syntax tree of a text; it is shared, so nobody may change it."""
    return ast.parse(text)


def bound_names(node):
    """The names that a statement makes in its module or class."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(a.asname or a.name).split(".")[0] for a in node.names}
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return {node.id}
    own_scope = isinstance(node, ast.Lambda | ast.comprehension)
    inner = () if own_scope else ast.iter_child_nodes(node)
    return set().union(*map(bound_names, inner))


def find(tree, dotted):
    """The statement that makes "name" or "Class.name", or None."""
    for name in dotted.split("."):
        body = getattr(tree, "body", [])
        tree = next((n for n in reversed(body) if name in bound_names(n)), None)
    return tree


def cut(text, dotted):
    """The lines before a function or class, its own, and those after it."""
    node = find(parse(text), dotted)
    decorators = getattr(node, "decorator_list", [])
    first = min(n.lineno for n in [node, *decorators]) - 1
    # as Python counts lines: neither a form feed nor U+2028 ends one
    lines = io.StringIO(text).readlines()
    return lines[:first], lines[first : node.end_lineno], lines[node.end_lineno :]


def function_source(text, dotted):
    return "".join(cut(text, dotted)[1])


def replace_function(text, dotted, new):
    before, _, after = cut(text, dotted)
    return "".join([*before, new, *after])


def stub_of(text, dotted, message):
    """A function of a text with its body gone: its signature, docstring and decorators
    stay."""
    before, own, _ = cut(text, dotted)
    node = find(parse(text), dotted)
    first = node.body[0]
    documented = ast.get_docstring(node) is not None
    end = first.end_lineno if documented else first.lineno - 1
    body = f'{" " * first.col_offset}raise NotImplementedError("{message}")\n'
    return "".join([*own[: end - len(before)], body])


def shape_of(node, names=True):
    """A statement without docstrings, comments and layout; names=False: also without
    `pass` and annotations, and with numbers for the names of variables."""
    node, known = ast.parse(ast.unparse(node)).body[0], {}
    for each in ast.walk(node):
        if isinstance(each, ast.FunctionDef | ast.ClassDef):
            each.body = each.body[ast.get_docstring(each) is not None :]
        if names:
            continue
        if isinstance(getattr(each, "body", None), list):
            each.body = [x for x in each.body if not isinstance(x, ast.Pass)]
        if isinstance(each, ast.arg):
            each.annotation = None
            each.arg = known.setdefault(each.arg, f"x{len(known)}")
        elif isinstance(each, ast.Name):
            each.id = known.setdefault(each.id, f"x{len(known)}")
    return ast.dump(node)


def is_stub(node):
    """Does it still hold our NotImplementedError, and nothing else?"""
    if not isinstance(node, ast.FunctionDef):
        return False
    body = node.body[ast.get_docstring(node) is not None :]
    return [ast.unparse(x).split("(")[0] for x in body] == ["raise NotImplementedError"]


# ---- A student's code over the project's -------------------------------------------

MAKERS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign
STATES = "missing", "stub", "written", "project"  # of a function, see Work.state_of
MAX_BYTES = 10**6  # of a file
# a file that has this is a copy of the project's: make.py never writes it
LANDMARKS = {"model.py": "GPT", "data.py": "Tokenizer", "sft.py": "get_lr",
             "sdft.py": "get_lr", "extra.py": "write_checkpoint",
             "train.py": "main"}  # fmt: skip
OF_GRADERS = re.compile(r"(oracles|kit|variants|grade|make|run|e\d\d|test_e\d\d\w*)$")


def read_text(path):
    """A student's file: UTF-8 with a BOM or without, what its first lines say, UTF-16,
    or what an old Windows editor writes; any ends of lines."""
    raw = path.read_bytes()
    if len(raw) > MAX_BYTES:
        why = f"{path} has {len(raw):,} bytes, more than {MAX_BYTES:,}: it is not read"
        raise KitError(why, "keep the functions in it, nothing else")
    try:
        wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        line = io.BytesIO(raw).readline
        text = raw.decode("utf-16" if wide else tokenize.detect_encoding(line)[0])
    except (SyntaxError, UnicodeDecodeError):
        text = raw.decode("cp1252", "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def files_of(folder):
    """{file name: path} of a student's files, in the folder or at most three below it;
    a copy of the project beside them does not count."""
    untouched = {}
    for depth in range(4):
        found = sorted(folder.glob("[!._]*/" * depth + "*.py"))
        found = [path for path in found if path.name in FILES]
        own = {path.parent for path in found if read_text(path) != source(path.name)}
        if len(own) > 1:
            names = ", ".join(sorted(map(str, own)))
            raise KitError(f"several folders with exercises: {names}", "name one")
        if own:
            return {path.name: path for path in found if path.parent in own}
        first = {path.name: path for path in found if path.parent == found[0].parent}
        untouched = untouched or first
    return untouched


class Names(dict):
    """The built-in names of a student's code: where Python looks for what is not the
    student's own. Found there, too, is what the project's module has at that moment: a
    grader may have changed it."""

    def __init__(self, module):
        super().__init__(module.__builtins__, __import__=self.guarded_import)
        self.module, self.failed = module, {}

    def guarded_import(self, name, *args):
        if OF_GRADERS.match(name):
            raise ImportError(f"{name} is not there for a solution")
        return self.module.__builtins__["__import__"](name, *args)

    def __getitem__(self, name):
        if name in self.failed:
            self.say_why(name)
        project = vars(self.module)
        return project[name] if name in project else super().__getitem__(name)

    def say_why(self, name, *args, **kwargs):
        raise NameError(self.failed[name])

    def run(self, nodes, path):
        """One statement after the other: one that fails harms who uses its names.
        Returns what they have made."""
        made, futures = {"__builtins__": self, "__file__": path}, []
        made["__name__"] = self.module.__name__
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                futures.append(node)
            try:
                tree = ast.Module([*futures, node], type_ignores=[])
                exec(compile(tree, path, "exec", dont_inherit=True), made)
            except (Exception, SystemExit) as error:
                why = f"{path}:{node.lineno} ended with {type(error).__name__}: {error}"
                for name in bound_names(node):
                    self.failed[name] = f"{name} is not there: {why}"
        return made


class Work:
    """What a student has written: {file name: (path, text)} of a folder, or of texts.

    Of a file, what an exercise asks for is taken, whatever statement makes it, and all
    statements that make names of the student's own. What only does something (prints,
    calls) is left where it is.
    """

    def __init__(self, files, others=""):
        self.files, self.others, self.trees, self.errors = files, others, {}, {}
        for file, (path, text) in files.items():
            try:
                self.trees[file] = parse(text)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                line, column = (getattr(error, k, 1) or 1 for k in ("lineno", "offset"))
                text, what = getattr(error, "text", ""), getattr(error, "msg", "")
                what = what or str(error) or type(error).__name__
                hint = (f"Python cannot read line {line}, `{(text or '').strip()}`, or "
                        "the line above: mend it and run again")  # fmt: skip
                self.errors[file] = KitError(f"{path}:{line}:{column}: {what}", hint)

    @classmethod
    def of_folder(cls, folder, ids="e05"):
        """ids: of the exercises that are asked for, for the hint."""
        folder = Path(folder)
        if not folder.is_dir():
            hint = f"python tests/exercises/make.py {ids} --to {folder} makes it"
            raise KitError(f"{folder}: no such folder", hint)
        paths = files_of(folder)
        others = sorted(p.name for p in folder.iterdir() if p.name not in paths)
        files = {name: (str(p), read_text(p)) for name, p in paths.items()}
        return cls(files, ", ".join(others[:6]))

    def state_of(self, file, name):
        """Of one function: "missing", "stub", "project" (untouched, in a copy of the
        project's file) or "written". Raises KitError for a file that is no Python."""
        if file in self.errors:
            raise self.errors[file]
        tree = self.trees.get(file)
        node = find(tree, name)
        if node is None or is_stub(node):
            return "stub" if node else "missing"
        untouched = shape_of(node) == shape_of(find(parse(source(file)), name))
        return "project" if untouched and find(tree, LANDMARKS[file]) else "written"

    def fingerprint(self, ex):
        """Equal for solutions that differ in names, `pass` and annotations alone:
        "project" for the project's; "" for one so short that many write the same."""
        own = [find(parse(source(file)), name) for file, name in ex.pairs]
        if sum(isinstance(n, ast.stmt) for x in own for n in ast.walk(x)) <= 5:
            return ""
        theirs = [find(self.trees[file], name) for file, name in ex.pairs]
        own, theirs = ([shape_of(x, False) for x in each] for each in (own, theirs))
        text = "".join(theirs).encode()
        return "project" if own == theirs else hashlib.sha256(text).hexdigest()

    def states(self, ex):
        return [self.state_of(*pair) for pair in ex.pairs]

    def state(self, ex):
        """The same of an exercise: "written" if at least one of its functions is and
        none is missing or a stub."""
        return min(self.states(ex), key=STATES.index)

    def instead(self, ex):
        """Of an exercise that is missing: what is not there, and what is."""
        file, name = ex.pairs[self.states(ex).index("missing")]
        name, made = name.split(".")[-1], {}
        for where, tree in self.trees.items():
            for node in () if find(tree, LANDMARKS[where]) else ast.walk(tree):
                for n in bound_names(node) if isinstance(node, MAKERS) else ():
                    text = f"; line {node.lineno} of {where} makes {n}"
                    made.setdefault(n.lower(), text)
        near = difflib.get_close_matches(name.lower(), made, 1, 0.8)
        there = made[near[0]] if near else ""
        if file in self.files:
            return f"{file} has no `{name}` at its top level{there}"
        return f"no {file}{there or f', but {self.others}' * bool(self.others)}"

    def taken(self, exs, file):
        """The statements that are taken from a file. A class of the project's of which
        methods are asked for becomes a class that inherits all but those."""
        own, wanted = parse(source(file)), {n for ex in exs for n in ex.names_in(file)}
        asked = {n for ex in exercises().values() for n in ex.names_in(file)} - wanted
        shapes = {shape_of(node) for node in own.body}
        for node in self.trees[file].body:
            names = bound_names(node)
            methods = {n.split(".")[1] for n in wanted
                       if "." in n and n.split(".")[0] in names}  # fmt: skip
            same = find(own, getattr(node, "name", ""))
            # of another exercise, or a helper with its name?
            another = isinstance(node, ast.FunctionDef) and node.name in asked and (
                is_stub(node) or ast.dump(node.args) == ast.dump(same.args)
            )
            untouched = not names & wanted and shape_of(node) in shapes
            if methods:
                theirs = {n for x in same.body for n in bound_names(x)}
                made = ast.parse(f"class {node.name}({node.name}): pass").body[0]
                made.body = [n for n in node.body if bound_names(n) & methods
                             or bound_names(n) - theirs]  # fmt: skip
                yield ast.copy_location(made, node)
            elif names and not another and not untouched:
                yield node

    def put_over(self, exs, graded, file, module):
        """Run what is taken from a file, at the student's own lines, and put what the
        exercises ask for into the module. graded: the exercise that is graded, if one
        is."""
        for name in graded.not_with if graded else ():
            where, _, function = name.partition(".")
            if where == file.removesuffix(".py"):
                setattr(module, function, functools.partial(absent, graded, name))
        if file not in self.trees:
            return
        names = Names(module)
        made = names.run(self.taken(exs, file), self.files[file][0])
        for name in {n.split(".")[0] for ex in exs for n in ex.names_in(file)}:
            own, one = vars(module)[name], made.get(name)
            if name in names.failed:
                one = functools.partial(names.say_why, name)
            elif graded and one is not None and not isinstance(own, type):
                one = watched(graded, one, own)
            setattr(module, name, own if one is None else one)

    def modules(self, exs, changes=()):
        """The project's modules with this work in them: one exercise, to be graded, or
        a list of them, to be run."""
        graded = exs if isinstance(exs, Exercise) else None
        exs = [exs] if graded else list(exs)
        return Modules(changes, functools.partial(self.put_over, exs, graded))


# ---- A function while it is graded -------------------------------------------------

MODE = {True: "train", False: "eval"}


def absent(ex, name, *args, **kwargs):
    """Stands in the place of what an exercise is about."""
    raise AssertionError(f"{name} is what you build in {ex.id}: write it yourself")


class NotWith(TorchDispatchMode):
    """Sees what torch computes inside, by whatever name it was called."""

    def __init__(self, ex):
        super().__init__()
        self.ex = ex

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.replace("aten::", "torch.")
        if name in self.ex.not_with:
            absent(self.ex, name.replace("._", "."))
        return func(*args, **(kwargs or {}))


def picture(x):
    """What can be compared later."""
    if isinstance(x, torch.nn.Module):
        return picture([(p, p.requires_grad, p.grad) for p in x.parameters()])
    if isinstance(x, list | tuple):
        return [picture(each) for each in x]
    if torch.is_tensor(x):
        return x.detach().clone()
    plain = isinstance(x, dict) or hasattr(x, "__dataclass_fields__")
    return copy.deepcopy(x) if plain else None


def same(a, b):
    """Of two pictures; NaN is NaN."""
    if torch.is_tensor(a) and torch.is_tensor(b):
        return a.shape == b.shape and bool(((a == b) | (a != a) & (b != b)).all())
    if isinstance(a, list | tuple) and len(a) == len(b):
        return all(map(same, a, b))
    return type(a) is type(b) and a == b


@contextmanager
def unchanged(function, **given):
    """Assert that these arguments are in the end what they were."""
    before = {name: picture(x) for name, x in given.items()}
    yield
    for name, x in given.items():
        kept = same(picture(x), before[name])
        assert kept, f"{function} changes {name}: work on a copy"


@contextmanager
def in_its_mode(function, name, model):
    """Assert that a model computes what it is trained with in the mode in which it was
    given, and that all its parts are in their modes in the end."""
    before, was = [m.training for m in model.modules()], MODE[model.training]

    def look(*_):
        now = MODE[model.training]
        assert now == was or not torch.is_grad_enabled(), (
            f"{function} computes what it trains with the {name} in {now} mode, it was "
            f"given in {was} mode: who calls decides on dropout"
        )

    hook = model.h[0].register_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()
    assert [m.training for m in model.modules()] == before, (
        f"the {name} was in {was} mode, and is in {MODE[model.training]} mode after "
        f"{function}: leave it as it is"
    )


def watched(ex, function, own):
    """A student's function, and after each call a look at what it was given: no truth
    may come from what was changed, and who calls decides on dropout."""
    names, title = list(inspect.signature(own).parameters), own.__name__

    @functools.wraps(function)
    def call(*args, **kwargs):
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        kept = {name: x for name, x in given.items() if name not in ex.changes}
        with ExitStack() as stack:
            stack.enter_context(unchanged(title, **kept))
            for name, x in given.items():
                if isinstance(x, torch.nn.Module):
                    stack.enter_context(in_its_mode(title, name, x))
            if any(name.startswith("torch.") for name in ex.not_with):
                stack.enter_context(NotWith(ex))
            return function(*args, **kwargs)

    return call


# ---- Grading -----------------------------------------------------------------------


@functools.cache
def graders(ex):
    """The test functions of an exercise, in their order: {name: function}."""
    (path,) = HERE.glob(f"test_{ex.id}_*.py")
    module = importlib.import_module(path.stem)
    return {k: v for k, v in vars(module).items() if k.startswith("test_")}


@contextmanager
def default_dtype(module):
    """float64 for new tensors if a grader's module says FLOAT64 = True."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if hasattr(module, "FLOAT64") else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def results(ex, impl, seed=0):
    """(test name, None or the exception that it ended with), one after the other. A
    test gets what it asks for by name: impl, rng (its own: --seed N makes all inputs
    fresh), seed, tmp_path."""
    for name, test in graders(ex).items():
        with default_dtype(inspect.getmodule(test)), TemporaryDirectory() as folder:
            has = {"impl": impl, "rng": impl.data.make_rng(seed, name), "seed": seed,
                   "tmp_path": Path(folder)}  # fmt: skip
            error = None
            try:
                test(**{n: has[n] for n in inspect.signature(test).parameters})
            except (Exception, SystemExit) as raised:
                error = raised
        yield name, error


def explain(error, ex):
    """What a student should read of a failure, without the hint line."""
    frames = traceback.extract_tb(error.__traceback__)
    last = Path(frames[-1].filename).stem if frames else ""
    if isinstance(error, AssertionError) and OF_GRADERS.match(last):
        text = str(error).split("\nassert ")[0]  # pytest adds what it saw
        return "\n".join(textwrap.fill(line, 88) for line in text.splitlines())
    kind = type(error).__name__
    if isinstance(error, NotImplementedError) and str(error).startswith(f"{ex.id}:"):
        return f"not written yet: {error}"
    ours = {str(path / file) for file, path in FILES.items()}
    theirs = [f for f in frames if f.filename not in ours
              and (Path(f.filename).name in FILES or f.filename[0] == "<")]  # fmt: skip
    lines = [f"  {f.filename}:{f.lineno}, in {f.name}: {f.line or ''}".rstrip()
             for f in theirs or frames[-2:]]  # fmt: skip
    said = set(re.findall(r"\w+", str(error).lower()))
    if isinstance(error, RuntimeError) and {"double", "float"} <= said:
        lines.append(f"float32 meets float64. {KEEP}")
    return "\n".join([f"it ended with {kind}: {error}".rstrip(": "), *lines])


# ---- What graders use --------------------------------------------------------------


def small_model(impl, **changes):
    """oracles.make_model with the GPT of the modules under test, in float64."""
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
    both = (x.reshape(-1, x.size(-1)).tolist() for x in (student, teacher))
    found = [value(*map(oracles.log_softmax, pair)) for pair in zip(*both, strict=True)]
    return torch.tensor(found, dtype=torch.float64).view(student.shape[:-1])


def mean(values, mask, n=None):
    """Of (B, R): over the tokens of a response, then over n responses (None: B), as a
    loop."""
    rows = oracles.rows_of(values, mask)
    total = sum(sum(row) / len(row) for row in rows if row)
    return torch.tensor(total / (n or len(mask)), dtype=torch.float64)


def one_number(loss):
    """The loss, if it is a tensor of shape ()."""
    assert not isinstance(loss, float | int), (
        f"the loss is {loss!r}, a Python number, which has no gradient: no .item(), "
        "and where does a sum start that found no token?"
    )
    shape = tuple(loss.shape) if torch.is_tensor(loss) else loss
    assert torch.is_tensor(loss) and shape == (), (
        f"the loss is one number, a tensor of shape (); yours is {shape!r}"
    )
    return loss


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
        same = is_close(value, truth, tolerance)
        assert same or not is_close(yours, value, max(tolerance, 1e-7)), message
    if not yours.isfinite().all() and truth.isfinite().all():
        raise AssertionError(f"{what} is not finite: {short(yours)}")
    far = (yours.detach().double() - truth.double()).abs()
    rounded = tolerance <= 1e-7 and rounds_to_float32(yours, truth)
    digits, text, at = 10 if rounded else 6, f"{what} is", ()
    if yours.numel() > SHOWN:
        bad = (far > tolerance * (1 + truth.abs())).nonzero().tolist()
        at = tuple(bad[0] if bad else ())
        text = (f"{what.rstrip(',')} {tuple(yours.shape)} has {len(bad)} numbers that "
                f"differ, the first at {list(at)}:")  # fmt: skip
    text += f" {short(yours[at], digits)}, it should be {short(truth[at], digits)}"
    text += f": up to {far.max().item():.2g} away"
    if rounded:
        text += f". {FLOAT32}"
        if not torch.equal(yours.double(), yours.float().double()):
            text += ". Or is a small number added, such as 1e-8?"
    raise AssertionError(text)


SHOWN = 6
KEEP = ("The grader gives you float64. Keep the dtype you are given (no .float(), no "
        "torch.zeros without dtype=)")  # fmt: skip
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
    first = x.flatten()[:SHOWN].tolist()
    values = ", ".join(f"{v:.{max(4, digits - 2)}g}" for v in first)
    return f"[{values}{', ...' if x.numel() > SHOWN else ''}]"
