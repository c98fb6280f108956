"""The command line: `polrl list`, `polrl train noise_mask --mask-strength 0.5`, `polrl lab` ..."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from polrl.core.errors import DataError, DivergedError, PolrlError, unknown_name

USAGE = """usage: polrl COMMAND [...]

  list                     the course's methods and the state of each
  info SLUG                what a method is: idea, knobs, equations, study, verdict
  train SLUG [--knob V]    train from the terminal, saved as it goes; --resume goes on
  study SLUG [--full]      put the paper's claim to the test
  sweep SLUG --over K=A,B  train at many strengths in parallel; a killed sweep resumes
  runs                     saved runs: list, clean
  check SLUG               the contract, test by test, on one method
  data list                data sets: list, check, make larger ones, fetch official ones
  new SLUG [--chapter C]   a method of your own: files that keep the contract from the first minute
  lab                      JupyterLab on the course
  doctor                   what is installed, and whether it works together

A method of your own, outside the course, is named by its file. Each takes --help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 not understood, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    if words[0] == "--version":
        import polrl

        print(polrl.__version__)
        return 0
    try:
        if words[0] not in COMMANDS:
            raise unknown_name("command", words[0], COMMANDS)
        return COMMANDS[words[0]](words[1:]) or 0
    except DivergedError as error:
        print(f"polrl: {error}", file=sys.stderr)
        return 1
    except (PolrlError, FileNotFoundError, ImportError) as error:
        print(f"polrl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("polrl: interrupted", file=sys.stderr)
        return 130


def _slug(words: list[str], command: str) -> str:
    if not words or words[0].startswith("-"):
        usage = f"usage: polrl {command} SLUG [--help]; `polrl list` shows the methods"
        raise PolrlError(usage)
    return words.pop(0)


def _parse(options: type[Any], words: list[str], prog: str, description: str) -> Any:
    import tyro

    return tyro.cli(options, args=words, prog=prog, description=description)


def _console() -> Any:
    from rich.console import Console

    return Console()


@dataclasses.dataclass
class ListOptions:
    """What `polrl list` takes."""

    built: bool = False
    """Show only what is built."""


def list_methods(words: list[str]) -> int:
    """Print the catalog."""
    from rich.table import Table

    from polrl.core.catalog import catalog

    built_only = False
    if words:
        built_only = _parse(ListOptions, words, "polrl list", "The course's methods and the state of each.").built
    console = _console()
    headings = ["chapter", "method", "state", "what it regularizes"][: 4 if console.width >= 120 else 3]
    table = Table(*headings[:3], box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    for heading in headings[3:]:
        table.add_column(heading)
    entries = catalog().values()
    for entry in entries:
        if entry.built or not built_only:
            style = "" if entry.built else "dim"
            row = (f"{entry.number} {entry.chapter}", entry.slug, entry.state, entry.regularizes or entry.title)
            table.add_row(*row[: len(headings)], style=style)
    console.print(table)
    console.print(f"\n{sum(e.built for e in entries)} built of {len(entries)}; more on one: polrl info SLUG")
    return 0


def info(words: list[str]) -> int:
    """Print what a stranger should know of a method."""
    slug = _slug(words, "info")
    from rich.markup import escape  # docstrings write shapes in brackets, which are markup here
    from rich.table import Table

    from polrl.core.catalog import find_method

    entry = find_method(slug)
    console = _console()
    console.print(f"[bold]{escape(entry.title)}[/bold]")
    paper = f"arXiv {entry.arxiv}" if entry.arxiv else "a baseline, no paper of its own"
    place = f"chapter {entry.number} {entry.chapter}; {paper}" if entry.chapter else "a method of your own"
    console.print(f"{entry.slug}: {place}; state: {entry.state}")
    if entry.kinds:
        console.print(f"{entry.regularizes} Kinds: {', '.join(entry.kinds)}.", markup=False)
    console.print()
    if not entry.built:
        console.print("This method is planned, but not built yet.")
        return 0
    from polrl.core.catalog import load_method
    from polrl.core.equation import equations

    learner = load_method(slug)
    for paragraph in (sys.modules[learner.__module__].__doc__ or "").strip().split("\n\n"):
        console.print(" ".join(paragraph.split()) + "\n", highlight=False, markup=False)
    knobs = Table(title="Knobs", title_justify="left", box=None, pad_edge=False)
    for heading in ("knob", "default", "range", "paper", "what it does"):
        knobs.add_column(heading)
    for knob in learner.Config.knobs.values():
        words_of_ends = "; ".join(
            filter(None, (knob.help, knob.at_low and f"low: {knob.at_low}", knob.at_high and f"high: {knob.at_high}"))
        )
        paper_value = "" if knob.paper is None else str(knob.paper)
        name = f"{knob.name} (first)" if knob.first else knob.name
        knobs.add_row(
            name, str(knob.default), knob.allowed().replace("a number ", ""), paper_value, escape(words_of_ends)
        )
    console.print(knobs)
    config = learner.Config()
    structure = ", ".join(f"{name}={getattr(config, name)!r}" for name in learner.Config.structure())
    console.print(f"\nStructure, fixed once a run has begun: {structure}", markup=False)
    if learner.phases:
        console.print(f"Phases: {', '.join(learner.phases)}")
    numbered = Table(title="\nEquations", title_justify="left", box=None, pad_edge=False)
    for number, marked in equations(learner).items():
        first = (marked.function.__doc__ or "").strip().split("\n")[0]
        numbered.add_row(number, marked.function.__name__, escape(first))
    console.print(numbered)
    _print_study(console, slug)
    console.print(f"\nFile: {entry.path}", soft_wrap=True)
    return 0


def _print_study(console: Any, slug: str) -> None:
    from polrl.core.catalog import find_method, load_study
    from polrl.core.study import kept_result

    try:
        study = load_study(slug)
    except PolrlError:
        return
    console.print(f"\nClaim: {study.claim}", markup=False)
    result = kept_result(slug)
    if result is None:
        console.print("The full study has not been run yet.")
        return
    for verdict in result.verdicts:
        console.print(f"  {verdict}", markup=False)
    if find_method(slug).state == "to be run again":
        console.print("  The method has changed since: the study is to be run again.")


@dataclasses.dataclass
class TrainOptions:
    """What `polrl train` takes besides the method's own settings."""

    steps: int = 0
    """Updates to do; 0 for the method's own budget."""
    threads: int = 0
    """torch threads; 0 for torch's own choice."""
    resume: Path | None = None
    """A run folder to go on from; the method's settings are then the saved ones."""
    folder: Path | None = None
    """Where to save; a folder of its own among your runs if not given."""


def train(words: list[str]) -> int:
    """Train one method, saved as it goes."""
    slug = _slug(words, "train")
    from polrl.core.catalog import find_method, load_method
    from polrl.core.errors import KnobError
    from polrl.core.run import Run
    from polrl.core.store import new_run_folder

    learner_class, name = load_method(slug), find_method(slug).slug
    options, config = _options_and_config(learner_class, words, TrainOptions, f"polrl train {slug}")
    if options.steps < 0 or options.threads < 0:
        raise KnobError(f"steps and threads must be at least 0, got {options.steps} and {options.threads}")
    if options.resume is not None:
        run = Run.load(options.resume, learner_class)
    else:
        threads = options.threads or None
        run = Run(learner_class(config), folder=options.folder or new_run_folder(name), threads=threads)
    budget = options.steps or run.learner.budget - run.step
    if budget <= 0 and not options.steps:
        raise KnobError(f"the run is at step {run.step} and its budget is spent; name --steps to go on")
    folder = run.folder
    try:
        _advance_with_bar(run, budget, name)
        figures = run.evaluate()
    finally:
        run.close()
    for name, value in figures.items():
        print(f"{name:24} {value:.4f}")
    print(f"step {run.step}; saved in {folder}")
    return 0


def _advance_with_bar(run: Any, steps: int, slug: str) -> None:
    from tqdm import tqdm

    with tqdm(total=steps, desc=slug, unit="step", delay=2.0, leave=False) as bar:
        done = 0
        while done < steps:
            part = min(max(1, steps // 200), steps - done)
            run.advance(part)
            done += part
            bar.update(part)
            latest = run._history.copy().frame().iloc[-1]
            bar.set_postfix({name: f"{latest[name]:.3g}" for name in run._history.metrics[:3]}, refresh=False)


def _options_and_config(learner: Any, words: list[str], options: type[Any], prog: str) -> tuple[Any, Any]:
    """Parse a command's own options and the method's settings from one command line."""
    import tyro

    config = learner.Config
    # A method may have a setting of the same name as an option: its settings then begin with --config.
    taken = {field.name for field in dataclasses.fields(options)} & set(config.model_fields)
    prefix = "config" if taken else ""
    combined = dataclasses.make_dataclass(
        "Options",
        [
            ("options", Annotated[options, tyro.conf.arg(name="")], dataclasses.field(default_factory=options)),
            ("config", Annotated[config, tyro.conf.arg(name=prefix)], dataclasses.field(default_factory=config)),
        ],
    )  # fmt: skip
    parsed = _parse(combined, words, prog, (learner.__doc__ or "").split("\n")[0])
    return parsed.options, parsed.config


@dataclasses.dataclass
class StudyOptions:
    """What `polrl study` takes."""

    full: bool = False
    """Run the full form, on which the verdict rests; its result is kept in course/results of a checkout."""
    smoke: bool = False
    """Only see whether it runs."""
    jobs: int = 0
    """Trainings at once; 0 for as many as there are cores."""


def study(words: list[str]) -> int:
    """Run a study and print its figures and verdicts."""
    slug = _slug(words, "study")
    from polrl.core.catalog import find_method, load_study

    options = _parse(StudyOptions, words, f"polrl study {slug}", "Put the paper's claim to the test.")
    mode: Literal["smoke", "fast", "full"] = "full" if options.full else "smoke" if options.smoke else "fast"
    stated = load_study(slug)
    print(f"{slug}, {mode} form: {stated.claim}")
    result = stated.run(mode, n_jobs=options.jobs or None)
    print(result.table().T.to_string())
    print()
    for verdict in result.verdicts:
        print(verdict)
    if mode == "full":
        from polrl.core.files import asset_roots
        from polrl.core.study import keep_result

        entry = find_method(slug)
        own = entry.path.parent if entry.path and not entry.chapter else None  # its result lies beside its file
        folder = own or asset_roots()[0] / "course" / "results"
        print(f"\nkept in {keep_result(dataclasses.replace(result, slug=entry.slug), folder)}")
    return 0


@dataclasses.dataclass
class SweepOptions:
    """What `polrl sweep` takes besides the method's own settings."""

    over: tuple[str, ...] = ()
    """The settings to vary, each with its values: mask_strength=0,0.5,1"""
    seeds: int = 1
    """Seeds 0, 1, ... at every point."""
    steps: int = 0
    """Updates a training; 0 for the method's own budget."""
    jobs: int = 0
    """Trainings at once; 0 for as many as there are cores."""
    folder: Path | None = None
    """Where results are kept, so that a killed sweep resumes; in your cache if not given."""


def sweep_command(words: list[str]) -> int:
    """Train at every point of a grid and print the table."""
    slug = _slug(words, "sweep")
    import platformdirs

    from polrl.core.catalog import find_method, load_method
    from polrl.core.sweep import sweep

    learner, name = load_method(slug), find_method(slug).slug
    options, config = _options_and_config(learner, words, SweepOptions, f"polrl sweep {slug}")
    if not options.over:
        raise PolrlError(f"--over must name what to vary, such as --over {next(iter(learner.Config.knobs))}=0,0.5,1")
    folder = options.folder or Path(platformdirs.user_cache_dir("polrl", appauthor=False)) / "sweeps" / name
    table = sweep(
        learner,
        dict(_grid_line(learner, line) for line in options.over),
        seeds=range(options.seeds),
        steps=options.steps,
        settings={name: getattr(config, name) for name in config.model_fields_set if name != "seed"},
        n_jobs=options.jobs or None,
        folder=folder,
    )
    print(table.to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    return 0


def _grid_line(learner: Any, line: str) -> tuple[str, list[Any]]:
    import ast

    name, equals, values = line.partition("=")
    fields = learner.Config.model_fields
    if name not in fields:
        raise unknown_name("knob or setting", name, fields)
    if not equals or not values:
        raise PolrlError(f"--over {line!r} must have the form NAME=VALUE,VALUE")
    if fields[name].annotation in (float, int, bool):
        try:
            return name, [ast.literal_eval(value) for value in values.split(",")]
        except (ValueError, SyntaxError):
            raise PolrlError(f"--over {line!r}: the values of {name} must be numbers or True and False") from None
    return name, values.split(",")


@dataclasses.dataclass
class RunsOptions:
    """What `polrl runs` takes."""

    clean: bool = False
    """Delete the oldest runs until the rest fits --keep and --megabytes; runs in use stay."""
    keep: int = 200
    """Runs to keep at the most."""
    megabytes: int = 2048
    """Room for all runs together."""


def runs(words: list[str]) -> int:
    """List or clean the saved runs."""
    from polrl.core.store import clean, list_runs, runs_root

    options = _parse(RunsOptions, words, "polrl runs", "Saved runs: list, clean.")
    if options.clean:
        dropped = clean(options.megabytes * 1024**2, options.keep)
        print(f"deleted {len(dropped)} runs")
    found = list_runs()
    for run in found:
        used = "  in use" if run.locked else ""
        print(f"{run.modified:%Y-%m-%d %H:%M}  {run.nbytes / 1e6:8.1f} MB  {run.path.name}{used}")
    total = sum(run.nbytes for run in found) / 1e6
    print(f"{len(found)} runs, {total:.1f} MB, in {runs_root()}")
    return 0


def check(words: list[str]) -> int:
    """Run the conformance suite on one method."""
    slug = _slug(words, "check")
    from polrl.core.catalog import load_method
    from polrl.core.conformance import ALL_CHECKS, case_of

    case, failed = case_of(load_method(slug)), 0
    for each in ALL_CHECKS:
        name = each.__name__.removeprefix("check_").replace("_", " ")
        try:
            each(case)
            print(f"ok      {name}")
        except Exception as error:
            failed += 1
            print(f"FAILED  {name}: {type(error).__name__}: {error}")
    print(f"{len(ALL_CHECKS) - failed} of {len(ALL_CHECKS)} checks hold")
    return 1 if failed else 0


DATA_USAGE = """usage: polrl data ACTION ...

  list            the data sets: those that come with polrl, and those in your Minari folder
  check [NAME]    whether they are whole, and what they hold is in order; all of them, or one
  make KIND ...   run the script that makes such data, with its own options: polrl data make KIND --help
  fetch ID        download an official Minari set, such as mujoco/hopper/medium-v0"""


def data(words: list[str]) -> int:
    """List, check, make or fetch data sets."""
    from polrl.core import data as sets

    actions = {"list": (0, 0), "check": (0, 1), "make": (1, 1000), "fetch": (1, 1)}  # how many words may follow
    if not words or words[0] in ("-h", "--help"):
        print(DATA_USAGE)
        return 0 if words else 2
    action, rest = words[0], words[1:]
    if action not in actions:
        raise unknown_name("action", action, actions)
    if action != "make" and {"-h", "--help"} & set(rest):
        print(DATA_USAGE)
        return 0
    least, most = actions[action]
    if not least <= len(rest) <= most or (rest and rest[0].startswith("-")):
        kinds = f"; kinds: {', '.join(sets.makers())}" if action == "make" else ""
        raise PolrlError(f"polrl data {' '.join(words)} was not understood{kinds}; see polrl data --help")
    if action == "make":
        return sets.make(rest[0], rest[1:])
    if action == "list":
        return _list_data(sets)
    if action == "check":
        return _check_data(sets, rest)
    print(f"fetching {rest[0]} into {sets.minari_folder()} ...", flush=True)
    try:
        added = sets.fetch(rest[0])
    except DataError as error:
        print(f"polrl: {error}", file=sys.stderr)
        return 1
    print(f"fetched: {', '.join(added)}" if added else "it is there already")
    return 0


def _list_data(sets: Any) -> int:
    from rich.markup import escape
    from rich.table import Table

    console, found = _console(), [*sets.included_sets(), *sets.local_minari_sets()]
    table = Table(box=None, pad_edge=False)
    table.add_column("data set", min_width=max((len(each.name) for each in found), default=0))
    for heading, width in (("rows", 9), ("MB", 5), ("mean return", 11)):
        table.add_column(heading, justify="right", min_width=width)
    table.add_column("what", no_wrap=True, overflow="ellipsis")
    for each in found:
        rows = "" if each.rows is None else f"{each.rows:,}"
        mean_return = "" if each.mean_return is None else f"{each.mean_return:.1f}"
        table.add_row(each.name, rows, f"{each.nbytes / 1e6:.1f}", mean_return, escape(each.problem or each.kind))
    console.print(table)
    print(f"\n{len(found)} data sets, {sum(each.nbytes for each in found) / 1e6:.1f} MB; to make more: polrl data make")
    return 0


def _check_data(sets: Any, names: list[str]) -> int:
    chosen = [sets.find_set(name) for name in names] or [*sets.included_sets(), *sets.local_minari_sets()]
    failed = 0
    for each in chosen:
        try:
            count = sets.check_files(each)
            words = f"{count} file(s) as the manifest says" if count else "no manifest"
            if each.form == "minari":
                from polrl.worlds.offline_data import load_offline

                words += f"; {len(load_offline(str(each.folder))):,} rows in order"
            print(f"ok      {each.name}: {words}")
        except DataError as error:
            failed += 1
            print(f"FAILED  {each.name}: {error}", file=sys.stderr)
    return 1 if failed else 0


@dataclasses.dataclass
class NewOptions:
    """What `polrl new` takes."""

    chapter: str = ""
    """In a checkout of polrl: the chapter to which the method goes. Without it, it gets a folder of its own here."""


def new(words: list[str]) -> int:
    """Begin a method of one's own."""
    slug = _slug(words, "new")
    from polrl.core.scaffold import new_method

    chapter = ""
    if words:
        chapter = _parse(NewOptions, words, f"polrl new {slug}", "Begin a method of your own.").chapter
    made = new_method(slug, chapter)
    print(made.written(), *made.next_steps(), sep="\n")
    return 0


@dataclasses.dataclass
class LabOptions:
    """What `polrl lab` takes."""

    port: int = 8888
    """The first port to try; the next free one is taken if it is in use."""
    browser: bool = True
    """Open a browser window."""


def lab(words: list[str]) -> int:
    """Start JupyterLab on the course's first page, for this machine only, with a token."""
    import importlib.util
    import os

    from polrl.core.files import find_asset

    options = _parse(LabOptions, words, "polrl lab", "JupyterLab on the course.")
    if importlib.util.find_spec("jupyterlab") is None:
        raise ImportError("JupyterLab is not installed; install polrl with its extra: pip install 'polrl[course]'")
    root = find_asset("course/index.ipynb").parents[1]
    command = [sys.executable, "-m", "jupyterlab", *lab_arguments(root, options.port)]
    if not options.browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # in a container
    os.execv(sys.executable, command)  # JupyterLab itself then answers Ctrl-C


def lab_arguments(root: Path, port: int) -> list[str]:
    """Return the server's arguments: this machine only, a token, and other ports where the first is taken."""
    return [
        f"--ServerApp.root_dir={root}",
        "--ServerApp.ip=localhost",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=50",
        "--LabApp.default_url=/lab/tree/course/index.ipynb",
    ]


@dataclasses.dataclass
class DoctorOptions:
    """What `polrl doctor` takes."""


def doctor(words: list[str]) -> int:
    """Say what is installed and whether it works together."""
    _parse(DoctorOptions, words, "polrl doctor", "What is installed, and whether it works together.")
    from polrl.core.doctor import examine

    findings = examine()
    for finding in findings:
        print(f"{'ok  ' if finding.good else 'BAD '}  {finding.name:18} {finding.words}")
    bad = sum(not finding.good for finding in findings)
    print("everything works" if not bad else f"{bad} to be mended")
    return 1 if bad else 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "list": list_methods,
    "info": info,
    "train": train,
    "study": study,
    "sweep": sweep_command,
    "runs": runs,
    "check": check,
    "data": data,
    "new": new,
    "lab": lab,
    "doctor": doctor,
}

if __name__ == "__main__":
    sys.exit(main())
