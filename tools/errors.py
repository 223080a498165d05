"""The page docs/errors.md, of the program's own lists of exit codes and causes: `python -m tools.errors > docs/errors.md`."""
import errno
from pathlib import Path

import jinja2

from pipeline.io_errors import CAUSES
from train.cli import Parser
from train.exit_codes import EXIT_CODES

TEMPLATE = Path(__file__).resolve().parent.parent / "docs/errors.md.jinja"


def page() -> str:
    """The text of docs/errors.md."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                                     keep_trailing_newline=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        codes=EXIT_CODES, causes=CAUSES, names=errno.errorcode)


if __name__ == "__main__":
    Parser(description=__doc__, example="python -m tools.errors > docs/errors.md").parse_args()
    print(page(), end="")
