"""The process in which math-verify judges: a line of JSON in, a line out. `math_answers` starts it.

It imports nothing of this package, so that it starts without its libraries.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any


def main() -> None:
    """Answer every line of the standard input until it ends."""
    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no reply
    package = importlib.import_module("math_verify")  # of the extra `math`
    parse, verify = package.parse, package.verify

    def expressions(text: str) -> Any:
        """A solution may be LaTeX without the dollars that math-verify looks for: it would take one number of it."""
        marked = "$" in text or "\\boxed" in text or "\\(" in text or "\\[" in text
        return parse(text if marked else f"${text}$") or parse(text)

    def judged(gold: list[str], answer: str) -> dict[str, Any]:
        wanted = [found for text in gold if (found := expressions(text))]
        if not wanted:
            return {"error": "the solution is no mathematical expression"}
        given = parse(answer)
        return {"correct": any(bool(verify(one, given)) for one in wanted)}

    replies.write('{"ready": true}\n')
    replies.flush()
    for line in sys.stdin:
        question = json.loads(line)
        try:
            said = judged(question["gold"], question["answer"])
        except Exception as error:  # of whatever kind: the next question has nothing to do with it
            said = {"error": f"math-verify stopped with {type(error).__name__}"}
        replies.write(json.dumps(said) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
