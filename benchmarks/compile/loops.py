# SPDX-License-Identifier: Apache-2.0
"""Loops of assembly: which instructions of a kernel repeat."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class _Block:
    """Lines without a jump in or out, and the numbers of the blocks that follow."""

    lines: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    jumps: list[str] = field(default_factory=list)
    falls: bool = True


@dataclass(frozen=True)
class Syntax:
    """Of an assembly language, as regular expressions over a line.

    Attributes:
        label: start of a block; group 1 is its name.
        branch: a jump; group 1 is where to.
        conditional: a line with ``branch`` that may also go on.
        stop: a line after which nothing goes on.
    """

    label: re.Pattern[str]
    branch: re.Pattern[str]
    conditional: re.Pattern[str]
    stop: re.Pattern[str]


SASS = Syntax(
    label=re.compile(r"^\s*(\.L_x_\d+):"),
    branch=re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)"),
    conditional=re.compile(r"@!?U?P\w+\s+BRA|\bBRA\b[^`]*\bU?P\d|BRA\.(?:DIV|CONV|U)"),
    stop=re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:EXIT|RET\S*|BPT\S*)\b"),
)
GCN = Syntax(
    label=re.compile(r"^(\.LBB\d+_\d+):"),
    branch=re.compile(r"\bs_c?branch\w*\s+(\.LBB\d+_\d+)"),
    conditional=re.compile(r"\bs_cbranch"),
    stop=re.compile(r"^\s+(?:s_endpgm|s_setpc_b64|s_trap)\b"),
)


def main_loop(text: str, syntax: Syntax, matrix: re.Pattern[str]) -> str | None:
    """The innermost loop with matrix instructions, of several that with the most.

    A loop is a natural one: a block that jumps back to one that it is only reached
    through, and all on the way between them.

    Args:
        text: of a function.
        syntax: of its language.
        matrix: what a matrix instruction has in its line.

    Returns:
        Its lines, None without such a loop.
    """
    blocks = _blocks(text, syntax)
    place = {name: i for i, block in enumerate(blocks) for name in block.labels}
    after = [
        sorted(
            {place[name] for name in block.jumps if name in place}
            | ({i + 1} if block.falls and i + 1 < len(blocks) else set())
        )
        for i, block in enumerate(blocks)
    ]
    counts = [sum(bool(matrix.search(line)) for line in b.lines) for b in blocks]
    loops = [body for body in _loops(after) if any(counts[i] for i in body)]
    innermost = [body for body in loops if not any(other < body for other in loops)]
    if not innermost:
        return None
    best = max(innermost, key=lambda body: sum(counts[i] for i in body))
    return "\n".join(line for i in sorted(best) for line in blocks[i].lines)


def _blocks(text: str, syntax: Syntax) -> list[_Block]:
    blocks = [_Block()]
    ended = False
    for line in text.splitlines():
        if match := syntax.label.match(line):
            if blocks[-1].lines:
                blocks.append(_Block())
            blocks[-1].labels.append(match[1])
            ended = False
            continue
        if ended:
            blocks.append(_Block())
            ended = False
        blocks[-1].lines.append(line)
        if match := syntax.branch.search(line):
            blocks[-1].jumps.append(match[1])
            blocks[-1].falls = bool(syntax.conditional.search(line))
            ended = True
        elif syntax.stop.match(line):
            blocks[-1].falls = False
            ended = True
    return blocks


def _loops(after: list[list[int]]) -> Iterator[frozenset[int]]:
    """Natural loops of a graph from its first node, one for each head."""
    before: list[set[int]] = [set() for _ in after]
    for node, following in enumerate(after):
        for other in following:
            before[other].add(node)
    dominators = _dominators(after, before)
    bodies: dict[int, set[int]] = {}
    for node, following in enumerate(after):
        for head in following:
            if head not in dominators[node]:
                continue
            body, open_nodes = bodies.setdefault(head, {head}), [node]
            while open_nodes:
                found = open_nodes.pop()
                if found not in body:
                    body.add(found)
                    open_nodes += before[found]
    yield from map(frozenset, bodies.values())


def _dominators(after: list[list[int]], before: list[set[int]]) -> list[set[int]]:
    """Nodes that every way from the first to a node goes through; none where none."""
    reached, open_nodes = {0}, [0]
    while open_nodes:
        for other in after[open_nodes.pop()]:
            if other not in reached:
                reached.add(other)
                open_nodes.append(other)
    found = [set(reached) if node in reached else set() for node in range(len(after))]
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for node in sorted(reached - {0}):
            ways = [found[other] for other in before[node] if other in reached]
            new = set.intersection(*ways) | {node}
            if new != found[node]:
                found[node], changed = new, True
    return found
