"""Count the texts that a run would train on.

python -m data wmt17-20:en-zh
python -m data news.txt --source en --target de,zh --out texts.jsonl
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from data import loading


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data",
        description=f"{__doc__}\n{loading.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("data", help="files and sets, with commas between them")
    option("--source", default="", help="languages of texts that do not name theirs")
    option("--target", default="", help="languages to translate into")
    option("--skip-bad-lines", action="store_true", help="count bad lines instead of stopping")
    option("--out", help="JSON lines file to write the tasks to")
    args = parser.parse_args(argv)
    try:
        corpus = loading.load_corpus(args.data, args.source, args.target, args.skip_bad_lines)
        print(corpus.report())
        for (source, target), n in Counter((t.source, t.target) for t in corpus.tasks).items():
            print(f"{source} to {target}: {n:,} texts")
        if args.out:
            rows = ({k: v for k, v in t._asdict().items() if v} for t in corpus.tasks)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            Path(args.out).write_text(lines, encoding="utf-8")
            print(f"{len(corpus.tasks):,} tasks in {args.out}")
    except (OSError, ValueError) as error:
        sys.exit(f"data: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
