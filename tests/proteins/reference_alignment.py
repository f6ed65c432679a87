"""The slow, obvious Smith-Waterman alignment (BLOSUM62, affine gaps 11/1)."""

from dataclasses import dataclass


@dataclass
class Alignment:
    score: int
    identities: set[tuple[int, int]]  # (equal residues, columns) of every best alignment


def local_alignment(a: str, b: str, open_gap: int = 11, extend: int = 1) -> Alignment:
    import parasail

    table, place = parasail.blosum62.matrix.copy(), parasail.blosum62.mapper.tolist()

    def similarity(x: str, y: str) -> int:
        return int(table[place[ord(x)], place[ord(y)]])

    Cell = tuple[float, frozenset[tuple[int, int]]]
    nothing: Cell = (float("-inf"), frozenset())
    fresh: Cell = (0.0, frozenset({(0, 0)}))

    def best(*cells: Cell) -> Cell:
        top = max(score for score, _ in cells)
        return top, frozenset().union(*(ways for score, ways in cells if score == top))

    def step(cell: Cell, gain: float, match: int) -> Cell:
        return cell[0] + gain, frozenset((m + match, c + 1) for m, c in cell[1])

    above = [fresh] * (len(b) + 1)
    gap_above = [nothing] * (len(b) + 1)
    found: Cell = fresh
    for x in a:
        row, gap_left = [fresh], nothing
        gaps = [nothing]
        for j, y in enumerate(b, start=1):
            gap_left = best(step(row[j - 1], -open_gap, 0), step(gap_left, -extend, 0))
            gaps.append(best(step(above[j], -open_gap, 0), step(gap_above[j], -extend, 0)))
            row.append(best(fresh, step(above[j - 1], similarity(x, y), x == y), gap_left, gaps[j]))
            found = best(found, row[j])
        above, gap_above = row, gaps
    return Alignment(int(found[0]), set(found[1]))
