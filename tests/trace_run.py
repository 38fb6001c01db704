"""How many of our files a run passes on its way to the first weight update.

python -m tests.trace_run        # one step of the toy, up to optimizer.step
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import torch

import ssr
from toy.pretrain import SHIPPED

ROOT = Path(__file__).parent.parent
BOOKKEEPING = {
    f"run/{name}.py"
    for name in ("checkpoint", "folder", "monitor", "console", "evaluation", "settings")
}


class Reached(BaseException):
    """The first optimizer step: the trip ends here."""


def trace(words: list[str]) -> dict[str, list[str]]:
    ran: dict[str, dict[str, None]] = {}

    def profile(frame, event, argument):
        code, path = frame.f_code, Path(frame.f_code.co_filename)
        if event == "call" and code.co_name[0] != "<" and path.is_relative_to(ROOT):
            file = path.relative_to(ROOT).as_posix()
            if file.split("/")[0] not in ("tests", ".venv"):
                ran.setdefault(file, {})[code.co_qualname] = None

    def reached(*_, **__):
        raise Reached

    real, torch.optim.AdamW.step = torch.optim.AdamW.step, reached
    try:
        with contextlib.suppress(Reached):
            sys.setprofile(profile)
            ssr.main(words)
            raise RuntimeError("the run ended without an optimizer step")
    finally:
        sys.setprofile(None)
        torch.optim.AdamW.step = real
    return {file: list(functions) for file, functions in ran.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        model = SHIPPED / "languages-seed0"
        ran = trace(["--preset=toy", "--steps=1", f"--model={model}", f"--folder={folder}/run"])
    for file, functions in ran.items():
        print(f"{file}{' (bookkeeping)' * (file in BOOKKEEPING)}: {', '.join(functions)}")
    print(f"{len(ran)} of our files ran functions, {len(ran.keys() - BOOKKEEPING)} without "
          "bookkeeping")  # fmt: skip
