"""Takes guards of the server and the page out, one at a time, and asks the tests to notice: `python tests/mutants.py`.

Each mutant is a copy of the sources with one change; the tests that it names must fail there, and pass without it. The
exit code is 1 where a mutant lives. test_mutants.py checks, in a second, that every change still fits the sources.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SERVE, UI = "src/peft_run/serve", "src/peft_run/ui"
SECURITY, API, RULES = "tests/run/test_serve_security.py", "tests/run/test_serve_api.py", "tests/run/test_ui_rules.py"
PROCESS = "tests/run/test_serve_process.py"


class Mutant(NamedTuple):
    """`old` in `file` becomes `new`; `tests` must notice. row: of the reliability bench."""

    row: str
    what: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant(
        "D6",
        "templates of adapters that come while the server runs are used",
        f"{SERVE}/service.py",
        "        if not trusted:  # a template is a program",
        "        if False:",
        f"{SECURITY}::test_a_template_from_outside_is_never_run",
    ),
    Mutant(
        "D6",
        "unknown fields of a request are passed over",
        f"{SERVE}/schema.py",
        'extra="forbid", strict=True',
        'extra="ignore", strict=True',
        f"{SECURITY}::test_a_template_from_outside_is_never_run",
    ),
    Mutant(
        "D6",
        "what an artefact says is not checked",
        f"{SERVE}/service.py",
        "return cls.model_validate(read_json(file))",
        "return cls.model_construct(**read_json(file))",
        f"{SECURITY}::test_a_broken_or_foreign_artefact_is_refused",
    ),
    Mutant(
        "D7",
        "adapters may come from anywhere",
        f"{SERVE}/service.py",
        "if os.path.commonpath([root, path]) != root or path == root:",
        "if path == root:",
        f"{SECURITY}::test_no_path_leads_out_and_no_name_is_a_path",
    ),
    Mutant(
        "D7",
        "a folder beside, whose name begins the same, counts as inside",
        f"{SERVE}/service.py",
        "if os.path.commonpath([root, path]) != root or path == root:",
        "if not path.startswith(root) or path == root:",
        f"{API}::test_no_path_leads_out_of_the_folder",
    ),
    Mutant(
        "D7",
        "links to files are followed",
        f"{SERVE}/service.py",
        "if os.path.islink(os.path.join(path, file)):",
        "if False:",
        f"{SECURITY}::test_no_path_leads_out_and_no_name_is_a_path",
    ),
    Mutant(
        "D7",
        "any text is an adapter's name",
        f"{SERVE}/adapters.py",
        "if not NAME.fullmatch(name) or name == BASE",
        "if name == BASE",
        f"{SECURITY}::test_no_path_leads_out_and_no_name_is_a_path",
    ),
    Mutant(
        "D7",
        "the page follows links before it looks where they lead",
        f"{UI}/workspace.py",
        "path = os.path.realpath(os.path.join(self.root, text))",
        "path = os.path.normpath(os.path.join(self.root, text))",
        f"{RULES}::test_what_is_refused",
    ),
    Mutant(
        "D7",
        "the page reads hidden files",
        f"{UI}/workspace.py",
        'if any(part.startswith(".") for part in parts):',
        "if False:",
        f"{RULES}::test_what_is_refused",
    ),
    Mutant(
        "D7",
        "uploads keep the name that they come with",
        f"{UI}/workspace.py",
        'plain = NAME.sub("-", os.path.basename(wanted.replace("\\\\", "/"))).strip(".-")',
        "plain = os.path.basename(wanted)",
        f"{RULES}::test_names_of_uploads_are_plain",
    ),
    Mutant(
        "D8",
        "images by address are passed over in silence",
        f"{SERVE}/schema.py",
        '    type: Literal["text"]\n    text: Text\n',
        '    type: str\n    text: Text = ""\n    image_url: Any = None\n',
        f"{SECURITY}::test_the_server_fetches_nothing_that_a_request_names",
    ),
    Mutant(
        "D8",
        "other names of this machine are answered, so a foreign site can lead here",
        f"{UI}/gate.py",
        "if self.own_names_only and name_of(host) not in LOOPBACK:",
        "if False:",
        f"{RULES}::test_on_loopback_only_own_names_and_own_forms_are_answered",
    ),
    Mutant(
        "D8",
        "forms of other sites are taken",
        f"{UI}/gate.py",
        "return origin is None or urlsplit(origin).netloc == host",
        "return True",
        f"{RULES}::test_on_loopback_only_own_names_and_own_forms_are_answered",
    ),
    Mutant(
        "D8",
        "the page fetches scripts and fonts from elsewhere",
        f"{UI}/gate.py",
        'text = FOREIGN.sub(b"", b"".join(self.parts))',
        'text = b"".join(self.parts)',
        f"{RULES}::test_pages_fetch_nothing_from_elsewhere",
    ),
    Mutant(
        "D9",
        "text goes through a shell",
        f"{SERVE}/service.py",
        "        if not isinstance(text, str):\n            if max(text)",
        '        if isinstance(text, str):\n            os.system(f"echo {text} > /dev/null")\n'
        "        if not isinstance(text, str):\n            if max(text)",
        f"{SECURITY}::test_text_is_text_in_every_field",
    ),
    Mutant(
        "E5",
        "numbers that are no tokens reach the model",
        f"{SERVE}/service.py",
        "if max(text) >= self.model.config.vocab_size:",
        "if False:",
        f"{SECURITY}::test_tokens_beyond_the_vocabulary_are_refused",
    ),
    Mutant(
        "E5",
        "what was not foreseen is told in another shape",
        f"{SERVE}/api.py",
        "    @app.exception_handler(RequestValidationError)\n",
        "",
        f"{API}::test_hostile_bodies_are_refused",
    ),
    Mutant(
        "E6",
        "bodies of any size are read",
        f"{SERVE}/gate.py",
        "            if size > self.largest:\n                return None\n",
        "",
        f"{API}::test_large_bodies_are_refused_before_they_are_read",
    ),
    Mutant(
        "E6",
        "a body may come for ever",
        f"{SERVE}/gate.py",
        "await asyncio.wait_for(self.body(headers, receive), BODY_SECONDS)",
        "await self.body(headers, receive)",
        f"{SECURITY}::test_a_slow_body_is_given_up",
    ),
    Mutant(
        "E6",
        "answers without number",
        f"{SERVE}/schema.py",
        "n: Annotated[int, Field(ge=1, le=16)] = 1",
        "n: int = 1",
        f"{SECURITY}::test_numbers_have_bounds_on_both_sides",
    ),
    Mutant(
        "E7",
        "a wrong key opens",
        f"{SERVE}/gate.py",
        'return hmac.compare_digest(key.strip(), self.key.encode()) and scheme.lower() == b"bearer"',
        'return bool(key) and scheme.lower() == b"bearer"',
        f"{API}::test_nothing_but_health_answers_without_the_key",
    ),
    Mutant(
        "E7",
        "any scheme will do",
        f"{SERVE}/gate.py",
        'return hmac.compare_digest(key.strip(), self.key.encode()) and scheme.lower() == b"bearer"',
        "return hmac.compare_digest(key.strip(), self.key.encode())",
        f"{API}::test_nothing_but_health_answers_without_the_key",
    ),
    Mutant(
        "E7",
        "models are listed without a key",
        f"{SERVE}/gate.py",
        'OPEN = {"/health"}',
        'OPEN = {"/health", "/v1/models"}',
        f"{API}::test_nothing_but_health_answers_without_the_key",
    ),
    Mutant(
        "E7",
        "other addresses need no secret on the page",
        f"{UI}/gate.py",
        "        if self.pass_ is not None:\n            answer",
        "        if False:\n            answer",
        f"{RULES}::test_other_addresses_need_the_secret",
    ),
    Mutant(
        "E8",
        "the queue has no end",
        f"{SERVE}/worker.py",
        "if more and self.queued() + more > self.queue:",
        "if False:",
        f"{API}::test_a_full_queue_is_429",
    ),
    Mutant(
        "E8",
        "a late answer goes on",
        f"{SERVE}/engine.py",
        "elif request.deadline is not None and now > request.deadline:",
        "elif False:",
        f"{API}::test_a_late_answer_is_a_timeout_and_frees_its_slot",
    ),
    Mutant(
        "E8",
        "a client that leaves keeps its slot",
        f"{SERVE}/running.py",
        "        self.gone = True\n        self.cancel()",
        "        return\n        self.cancel()",
        f"{PROCESS}::test_a_client_that_leaves_frees_its_slot_and_a_polite_end_lets_answers_finish",
    ),
]


def changed(text: str, mutant: Mutant) -> str:
    """Raises ValueError where the place is not there exactly once."""
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} has {text.count(mutant.old)} places like {mutant.old!r}")
    return text.replace(mutant.old, mutant.new)


def tested(mutant: Mutant | None, tests: str, folder: Path) -> bool:
    """Whether the tests pass on the mutant, or on the sources as they are."""
    for part in ("src", "tests", "recipes", "deploy"):
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, folder / file)
    if mutant is not None:
        file = folder / mutant.file
        file.write_text(changed(file.read_text(encoding="utf-8"), mutant), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests.split()]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def verdict(mutant: Mutant) -> str:
    with tempfile.TemporaryDirectory(prefix="peft-mutant-") as folder:
        return "LIVES" if tested(mutant, mutant.tests, Path(folder)) else "found"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", help="only these rows of the bench, for example D7 E6")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    mutants = [m for m in MUTANTS if not options.rows or m.row in options.rows]
    tests = " ".join(sorted({part for m in mutants for part in m.tests.split()}))
    with tempfile.TemporaryDirectory(prefix="peft-mutant-") as folder:
        if not tested(None, tests, Path(folder)):
            print("the tests fail without any change", file=sys.stderr)
            return 1
    print("| row | change | the tests |\n|---|---|---|")
    with ThreadPoolExecutor(options.jobs) as pool:
        found = []
        for mutant, said in zip(mutants, pool.map(verdict, mutants)):
            found.append(said)
            print(f"| {mutant.row} | {mutant.what} | {said} |", flush=True)
    return 1 if "LIVES" in found else 0


if __name__ == "__main__":
    sys.exit(main())
