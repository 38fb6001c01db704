"""Small WMT sets and FLORES-200 in the very files that sacreBLEU and the archives keep them in."""

from pathlib import Path

from sacrebleu.dataset import DATASETS

from judge import PAPER, Task

SGM = '<refset setid="t" srclang="any" trglang="any">\n<doc docid="d" origlang="en">\n%s</doc>\n'
XML = '<?xml version="1.0" encoding="utf-8"?>\n<dataset id="t"><doc origlang="en" id="d">%s</doc>'


def english(name: str, i: int) -> str:
    return f"The committee of {name} met in room {i} & agreed on the budget."


def chinese(name: str, i: int) -> str:
    return f"{name}委员会在第{i}号房间开会，就预算达成了一致意见。"


def side(name: str, language: str, count: int) -> list[str]:
    return [{"en": english, "zh": chinese}[language](name, i) for i in range(count)]


def escaped(text: str) -> str:
    return text.replace("&", "&amp;")


def fill(folder: Path, names: list[str], count: int = 12) -> None:
    """As if sacreBLEU (its folder) had fetched these sets, between English and Chinese."""
    for name in names:
        dataset, raw = DATASETS[name], folder / name / "raw"
        raw.mkdir(parents=True)
        for url in dataset.data:  # that it is there is all that is asked
            (raw / f"{name}.{Path(url).name}").write_text("an archive, unpacked")
        for pair, paths in dataset.langpairs.items():
            if pair not in ("en-zh", "zh-en"):
                continue
            texts = [side(name, language, count) for language in pair.split("-")]
            paths = [paths["path"]] if isinstance(paths, dict) else paths
            for path in paths:
                (raw / path).parent.mkdir(parents=True, exist_ok=True)
            if len(paths) == 2:
                for path, lines in zip(paths, texts, strict=True):
                    segments = [f'<seg id="{i}">{escaped(x)}</seg>\n' for i, x in enumerate(lines)]
                    (raw / path).write_text(SGM % "".join(segments))
                continue
            (wanted,) = dataset.kwargs["refs"]
            blocks = []
            for tag, language, lines in zip(("src", "ref"), pair.split("-"), texts, strict=True):
                segments = [f'<seg id="{i}">{escaped(x)}</seg>' for i, x in enumerate(lines, 1)]
                by = f' translator="{wanted}"' if tag == "ref" else ""
                blocks.append(f'<{tag} lang="{language}"{by}><p>{"".join(segments)}</p></{tag}>')
            (raw / paths[0]).write_text(XML % "".join(blocks) + "</dataset>\n")


def flores(folder: Path, count: int = 12) -> None:
    for part in ("dev", "devtest"):
        (folder / part).mkdir(parents=True)
        for file, language in (("eng_Latn", "en"), ("zho_Hans", "zh")):
            lines = side(f"flores {part}", language, count)
            (folder / part / f"{file}.{part}").write_text("\n".join(lines) + "\n")


def lessons(name: str) -> list[tuple[str, str]]:
    """Prompts as the paper asks them, and answers in their form."""
    found = []
    for i in range(12):
        sides = (english(name, i), "English"), (chinese(name, i), "Chinese")
        for (text, source), (answer, target) in (sides, sides[::-1]):
            task = Task(text, source, target)
            said = f"<think> ok </think> <answer> {answer} </answer>"
            found.append(("".join(PAPER.ask(task)), said))
            score = f"<think> ok </think> <answer> {50 + 5 * (i % 9)} </answer>"
            found.append(("".join(PAPER.ask_judge(task, answer)), score))
    return found
