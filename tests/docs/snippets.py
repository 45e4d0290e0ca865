"""Find the fenced blocks of the documentation, and the commands in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
    *(page for page in (ROOT / "docs").rglob("*.md")),
])  # fmt: skip
LANGUAGES = {"bash", "python", "yaml", "json", "text", "output"}
_FENCE = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>.+?) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None
    """Why it is not run, as the comment above it says."""
    printed_by: "Block | None" = None
    """The shell block directly above a block of output or JSON."""

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a shell block as lists of words; a line may hold several."""
        text = self.text.replace("$(which sparse-ft)", "sparse-ft").replace("\\\n", " ")
        found: list[list[str]] = [[]]
        for line in text.splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&>;")
            lexer.whitespace_split = True
            for word in lexer:
                if word in {"&&", ";"}:
                    found.append([])
                else:
                    found[-1].append(word)
            found.append([])
        return [command for command in found if command]


def blocks(*pages: Path) -> list[Block]:
    """Return the blocks of pages, of all pages by default."""
    made: list[Block] = []
    for page in pages or PAGES:
        content, end = page.read_text(encoding="utf-8"), 0
        for match in _FENCE.finditer(content):
            indent = match["indent"]
            lines = [line.removeprefix(indent) for line in match["text"].splitlines()]
            number = content.count("\n", 0, match.start("language")) + 1
            follows = made and made[-1].language == "bash" and not content[end : match.start()].strip()
            above = made[-1] if follows and match["language"] in {"output", "json"} else None
            made.append(Block(page, number, match["language"], "\n".join(lines) + "\n", match["reason"], above))
            end = match.end()
    return made


def sparse_ft_words(command: list[str]) -> list[str] | None:
    """Return the words after ``sparse-ft`` up to a redirection; None if the command is another one."""
    if "sparse-ft" not in command:
        return None
    words = command[command.index("sparse-ft") + 1 :]
    end = next((index for index, word in enumerate(words) if word in {">", "|", ">>"}), len(words))
    return words[:end]
