"""What the scripts of this folder share: exercises, stubs, a student's code, grading.

An exercise is two files: eNN.py says what is asked (an Exercise) and how people go
wrong; test_eNN_*.py is its grader. What a student writes is put over the project's own
modules, one exercise at a time: an error in one exercise takes no points of another.
"""

import __future__

import ast
import contextlib
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
import tempfile
import textwrap
import tokenize
import traceback
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py: read by torch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from variants import FILES, HERE, ROOT, KitError, Modules, source

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
    # what is absent while it is graded: "model.kl_reference", "torch._log_softmax"
    not_with: tuple = ()
    changes: tuple = ()  # arguments that the function is to change
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


def lines_of(text):
    """As Python counts them: neither a form feed nor U+2028 ends a line."""
    return io.StringIO(text).readlines()


def bound_names(node):
    """The names that a statement makes in its module or class."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(a.asname or a.name).split(".")[0] for a in node.names}
    if isinstance(node, ast.Lambda | ast.comprehension):
        return set()
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Store) else set()
    return set().union(*map(bound_names, ast.iter_child_nodes(node)))


def find(tree, dotted):
    """The statement that makes "name" or "Class.name", or None."""
    *outer, name = dotted.split(".")
    body = tree.body
    for each in outer:
        classes = [n for n in body if isinstance(n, ast.ClassDef) and n.name == each]
        body = classes[0].body if classes else []
    return next((n for n in reversed(body) if name in bound_names(n)), None)


def first_line(node):
    """Index of its first line, decorators included."""
    decorators = getattr(node, "decorator_list", ())
    return min([node.lineno, *(d.lineno for d in decorators)]) - 1


def function_source(text, dotted):
    """The lines of a function or class, or None."""
    node = find(parse(text), dotted)
    if node is None:
        return None
    return "".join(lines_of(text)[first_line(node) : node.end_lineno])


def replace_function(text, dotted, new):
    node, lines = find(parse(text), dotted), lines_of(text)
    return "".join([*lines[: first_line(node)], new, *lines[node.end_lineno :]])


def empty_function(text, dotted, message):
    """The text with the function's body gone: its signature, docstring and decorators
    stay, and every line around it."""
    node, lines = find(parse(text), dotted), lines_of(text)
    first = node.body[0]
    start = first.lineno - 1
    if ast.get_docstring(node) is not None:
        start = first.end_lineno
    body = f'{" " * first.col_offset}raise NotImplementedError("{message}")\n'
    return "".join([*lines[:start], body, *lines[node.end_lineno :]])


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
    call = body[0].exc if len(body) == 1 and isinstance(body[0], ast.Raise) else None
    return getattr(getattr(call, "func", call), "id", "") == "NotImplementedError"


# ---- A student's code over the project's -------------------------------------------

MAKERS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign
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
        places = {}
        for path in sorted(folder.glob("*/" * depth + "*.py")):
            hidden = any(p[0] in "._" for p in path.relative_to(folder).parts)
            if path.name in FILES and not hidden:
                places.setdefault(path.parent, {})[path.name] = path
        own = [place for place, files in places.items() if any(
               read_text(path) != source(name) for name, path in files.items()
               )]  # fmt: skip
        if len(own) > 1:
            found = ", ".join(map(str, own))
            raise KitError(f"several folders with exercises: {found}", "name one")
        if own:
            return places[own[0]]
        untouched = untouched or next(iter(places.values()), {})
    return untouched


class Names(dict):
    """The global names of a student's code. What is not the student's own is looked up
    in the project's module at that moment: a grader may have changed it."""

    def __init__(self, module, path):
        own_import = module.__builtins__["__import__"]

        def guarded(name, *args):
            if OF_GRADERS.match(name):
                raise ImportError(f"{name} is not there for a solution")
            own = name == module.__name__.split("_")[0]  # this file
            return module if own else own_import(name, *args)

        tools = {**module.__builtins__, "__import__": guarded}
        super().__init__(__builtins__=tools, __name__=module.__name__, __file__=path)
        self.module, self.failed = module, {}

    def __missing__(self, name):
        if name in self.failed:
            raise NameError(self.failed[name])
        return vars(self.module)[name]

    def run(self, nodes):
        """One statement after the other: one that fails harms who uses its names."""
        flags, path = 0, self["__file__"]
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                for name in bound_names(node):
                    flags |= getattr(__future__, name).compiler_flag
            # the body of a class asks the dictionary itself
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            used = {n: x for n, x in vars(self.module).items() if n in used - set(self)}
            self.update(used)
            try:
                tree = ast.Module([node], type_ignores=[])
                exec(compile(tree, path, "exec", flags, True), self)
            except (Exception, SystemExit) as error:
                why = f"{path}:{node.lineno} ended with {type(error).__name__}: {error}"
                for name in bound_names(node):
                    self.failed[name] = f"{name} is not there: {why}"
            for name, x in used.items():
                if self[name] is x:
                    del self[name]


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
                line, shown = getattr(error, "lineno", 1), getattr(error, "text", "")
                at = f"{path}:{line}:{getattr(error, 'offset', 1)}"
                self.errors[file] = KitError(
                    f"{at}: {getattr(error, 'msg', error)}",
                    f"Python cannot read line {line}, `{(shown or '').strip()}`, or "
                    "the line above: mend it and run again",
                )

    @classmethod
    def of_folder(cls, folder, ids="e05"):
        """ids: of the exercises that are asked for, for the hint."""
        folder = Path(folder)
        if not folder.is_dir():
            raise KitError(
                f"{folder}: no such folder",
                f"python tests/exercises/make.py {ids} --to {folder} makes it",
            )
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
        node = find(tree, name) if tree else None
        if node is None or is_stub(node):
            return "stub" if node else "missing"
        untouched = shape_of(node) == shape_of(find(parse(source(file)), name))
        return "project" if untouched and find(tree, LANDMARKS[file]) else "written"

    def fingerprint(self, ex):
        """Equal for solutions that differ in names, `pass` and annotations alone:
        "project" for the project's; "" for one so short that many write the same."""
        pairs = [function.split() for function in ex.functions]
        own = [find(parse(source(file)), name) for file, name in pairs]
        theirs = [find(self.trees[file], name) for file, name in pairs]
        if sum(isinstance(n, ast.stmt) for x in own for n in ast.walk(x)) <= 5:
            return ""
        own, theirs = ([shape_of(x, False) for x in each] for each in (own, theirs))
        text = "".join(theirs).encode()
        return "project" if own == theirs else hashlib.sha256(text).hexdigest()

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

    def instead(self, ex):
        """Of an exercise that is missing: what is not there, and what is."""
        for file, name in (function.split() for function in ex.functions):
            if self.state_of(file, name) != "missing":
                continue
            last, made = name.split(".")[-1], {}
            for where, tree in self.trees.items():
                for node in () if find(tree, LANDMARKS[where]) else ast.walk(tree):
                    for n in bound_names(node) if isinstance(node, MAKERS) else ():
                        text = f"; line {node.lineno} of {where} makes {n}"
                        made.setdefault(n, text)
            lower = {n.lower(): n for n in made}
            near = difflib.get_close_matches(last.lower(), lower, 1, 0.8)
            there = made[lower[near[0]]] if near else ""
            if file in self.files:
                return f"{file} has no `{last}` at its top level{there}"
            return f"no {file}{there or f', but {self.others}' * bool(self.others)}"

    def taken(self, exs, file):
        """The statements that are taken from a file, and those of classes, by class."""
        own, wanted = parse(source(file)), {n for ex in exs for n in ex.names_in(file)}
        has = {n: node for node in own.body for n in bound_names(node)}
        asked = {n for ex in exercises().values() for n in ex.names_in(file)} - wanted
        shapes = {shape_of(node) for node in own.body}
        statements, classes = [], {}
        for node in self.trees[file].body:
            names = bound_names(node)
            methods = {n.split(".")[1] for n in wanted
                       if "." in n and n.split(".")[0] in names}  # fmt: skip
            if methods:
                theirs = {n for x in has[node.name].body for n in bound_names(x)}
                classes[node.name] = [n for n in node.body if bound_names(n) & methods
                                      or bound_names(n) - theirs]  # fmt: skip
                continue
            # of another exercise, or a helper with its name?
            another = isinstance(node, ast.FunctionDef) and node.name in asked and (
                is_stub(node) or ast.dump(node.args) == ast.dump(has[node.name].args)
            )
            untouched = not names & wanted and shape_of(node) in shapes
            if names and not another and not untouched:
                statements.append(node)
        return statements, classes

    def put_over(self, exs, file, module, graded=None):
        """Run what is taken from a file, at the student's own lines, and put what the
        exercises ask for into the module. graded: the exercise that is graded, if one
        is."""
        for name in graded.not_with if graded else ():
            where, _, function = name.partition(".")
            if where == file.removesuffix(".py"):
                setattr(module, function, absent(graded, name))
        if file not in self.trees:
            return
        statements, classes = self.taken(exs, file)
        space = Names(module, self.files[file][0])
        space.run(statements)
        for name in [n for ex in exs for n in ex.names_in(file) if "." not in n]:
            if name in space.failed:
                setattr(module, name, lambda *_, n=name, **__: space[n])  # says why
            elif name in space:
                one = space[name]
                own = vars(module)[name]
                setattr(module, name, watched(graded, one, own) if graded else one)
        for name, nodes in classes.items():
            made = ast.parse(f"class {name}: pass").body[0]
            made.body = nodes
            space.run([made])
            for key in set().union(*map(bound_names, nodes)):
                setattr(vars(module)[name], key, vars(space[name])[key])
            del space[name]

    def modules(self, exs, changes=()):
        """The project's modules with this work in them: one exercise, to be graded, or
        a list of them, to be run."""
        graded = exs if isinstance(exs, Exercise) else None
        exs = [exs] if graded else list(exs)
        after = functools.partial(self.put_over, exs, graded=graded)
        return Modules(changes, after=after)


# ---- A function while it is graded -------------------------------------------------


def absent(ex, name):
    """Stands in the place of what an exercise is about."""

    def call(*args, **kwargs):
        raise AssertionError(f"{name} is what you build in {ex.id}: write it yourself")

    return call


class NotWith(TorchDispatchMode):
    """Sees what torch computes inside, by whatever name it was called."""

    def __init__(self, ex):
        super().__init__()
        self.ex = ex

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.replace("aten::", "torch.")
        if name in self.ex.not_with:
            absent(self.ex, name.replace("._", "."))()
        return func(*args, **(kwargs or {}))


def picture(x, whole=True):
    """What can be compared later. whole=False: of a model, its modes alone."""
    if isinstance(x, torch.nn.Module):
        found = [(p, p.requires_grad, p.grad) for p in x.parameters()] if whole else []
        return [m.training for m in x.modules()], picture(found)
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


def watched(ex, function, own):
    """A student's function, and after each call a look at what it was given: no truth
    may come from what was changed, and who calls decides on dropout."""
    names, title = list(inspect.signature(own).parameters), own.__name__
    sees_torch = any(name.startswith("torch.") for name in ex.not_with)

    @functools.wraps(function)
    def call(*args, **kwargs):
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        before = {n: picture(x, n not in ex.changes) for n, x in given.items()}
        models = {n: x for n, x in given.items() if isinstance(x, torch.nn.Module)}
        modes, hooks = {n: x.training for n, x in models.items()}, []

        def look(name, x, *_):
            assert x.training == modes[name] or not torch.is_grad_enabled(), (
                f"{title} computes what it trains with the {name} in "
                f"{MODE[x.training]} mode, it was given in {MODE[modes[name]]} mode: "
                "who calls decides on dropout"
            )

        for name, x in models.items():
            see = functools.partial(look, name, x)
            hooks.append(x.h[0].register_forward_pre_hook(see))
        try:
            with NotWith(ex) if sees_torch else contextlib.nullcontext():
                result = function(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        for name, x in given.items():
            now = picture(x, name not in ex.changes)
            assert name not in models or now[0] == before[name][0], (
                f"the {name} was in {MODE[modes[name]]} mode, and is in "
                f"{MODE[x.training]} mode after {title}: leave it as it is"
            )
            changed = name not in ex.changes and not same(now, before[name])
            assert not changed, f"{title} changes {name}: work on a copy"
        return result

    return call


MODE = {True: "train", False: "eval"}


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
    frames = traceback.extract_tb(error.__traceback__)
    last = Path(frames[-1].filename).name if frames else ""
    if isinstance(error, AssertionError) and OF_GRADERS.match(last.removesuffix(".py")):
        text = str(error).split("\nassert ")[0]  # pytest adds what it saw
        return "\n".join(textwrap.fill(line, 88) for line in text.splitlines())
    kind = type(error).__name__
    if isinstance(error, NotImplementedError) and str(error).startswith(f"{ex.id}:"):
        return f"not written yet: {error}"
    ours = {str(path / file) for file, path in FILES.items()} | {torch.__file__}
    theirs = [
        f for f in frames if f.filename not in ours
        and (Path(f.filename).name in FILES or f.filename.startswith("<"))
    ] or frames[-2:]  # fmt: skip
    lines = [f"  {f.filename}:{f.lineno}, in {f.name}: {f.line or ''}".rstrip()
             for f in theirs]  # fmt: skip
    if isinstance(error, RuntimeError) and re.search(
        r"\bdouble\b.*\bfloat\b|\bfloat\b.*\bdouble\b", str(error), re.I | re.S
    ):
        lines.append(f"float32 meets float64. {KEEP}")
    return "\n".join([f"it ended with {kind}: {error}".rstrip(": "), *lines])


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
    before = {name: picture(x) for name, x in given.items()}
    yield
    for name, x in given.items():
        kept = same(picture(x), before[name])
        assert kept, f"{function} changes {name}: work on a copy"


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
    far = (yours.detach().double() - truth.double()).abs()
    rounded = tolerance <= 1e-7 and rounds_to_float32(yours, truth)
    digits, where = 10 if rounded else 6, far.max().item()
    text = f"{what} is {short(yours, digits)}, it should be {short(truth, digits)}: "
    if yours.numel() > SHOWN:
        bad = (far > tolerance * (1 + truth.abs())).nonzero().tolist()
        at = tuple(bad[0] if bad else ())
        text = (
            f"{what.rstrip(',')} {tuple(yours.shape)} has {len(bad)} numbers that "
            f"differ, the first at {list(at)}: {short(yours[at], digits)}, it should "
            f"be {short(truth[at], digits)}: "
        )
    if rounded:
        wide = not torch.equal(yours.double(), yours.float().double())
        more = ". Or is a small number added, such as 1e-8?" if wide else ""
        raise AssertionError(f"{text}up to {where:.2g} away. {FLOAT32}{more}")
    raise AssertionError(f"{text}up to {where:.2g} away")


SHOWN = 6
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
    first = x.flatten()[:SHOWN].tolist()
    values = ", ".join(f"{v:.{max(4, digits - 2)}g}" for v in first)
    return f"[{values}{', ...' if x.numel() > SHOWN else ''}]"
