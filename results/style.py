"""Writes a manifest's transcripts in another style, which scoring removes: capitals and punctuation.

    python results/style.py example/train.jsonl OUT

Every English word begins with a capital, and the sentence ends with a full stop. A Chinese sentence gets a
comma behind every third character and a full stop. The result is OUT/train.jsonl.
"""

import json
import os
import pathlib
import sys


def styled(text, language):
    if language == "en":
        return " ".join(word.capitalize() for word in text.split()) + "."
    pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
    return "，".join(pieces) + "。"


def main(manifest, out):
    manifest = pathlib.Path(manifest)
    out = pathlib.Path(out)
    out.mkdir(parents=True)
    with open(out / "train.jsonl", "w", encoding="utf-8") as file:
        for raw in manifest.read_text(encoding="utf-8").splitlines():
            line = json.loads(raw)
            line["text"] = styled(line["text"], line["language"])
            line["audio"] = os.path.relpath(manifest.parent / line["audio"], out)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
