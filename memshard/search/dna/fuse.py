"""Replace parts of a program that have a faster form: softmax attention, that is exp(s) masked and
divided by its sum, and the squared ReLU.
"""

from collections import Counter

from memshard.models.program.program import Node, Program


def fuse(program: Program) -> Program:
    """Return the same program with every (mask(exp(c q k^T)) / its row sums) v, and every
    max(x, 0)^2, as one node.
    """
    uses = Counter(value for node in program.nodes for value in node.inputs)
    nodes: dict[int, Node] = dict(program.values())
    faster = {}
    for number, node in nodes.items():
        fused = (
            _attention(nodes, uses, node)
            if node.op == "MAT_MUL"
            else _squared_relu(nodes, uses, node)
            if node.op == "SQUARE"
            else None
        )
        if fused is not None:
            faster[number] = fused
    return _without_dead(program, {**nodes, **faster}) if faster else program


def _attention(nodes: dict[int, Node], uses: Counter[int], product: Node) -> Node | None:
    division, v = product.inputs
    # A value that others read as well must stay, and then nothing is saved.
    if not _is(nodes, division, "DIVIDE") or uses[division] > 1:
        return None
    # Two readers of the masked exponentials, the row sums and the division: a third
    # would need them.
    masked, total = nodes[division].inputs
    if not (
        _is(nodes, total, "RED_SUM")
        and nodes[total].inputs == (masked,)
        and _is(nodes, masked, "MASK")
        and uses[masked] == 2
    ):
        return None
    weights = nodes[masked].inputs[0]
    if not _is(nodes, weights, "EXP") or uses[weights] > 1 or uses[total] > 1:
        return None
    # A search may have lost the scale, or never had one.
    scores, factor = nodes[weights].inputs[0], 1.0
    if _is(nodes, scores, "C_MUL") and uses[scores] == 1:
        factor, scores = float(nodes[scores].argument or 0), nodes[scores].inputs[0]
    if not _is(nodes, scores, "T_MAT_MUL") or uses[scores] > 1:
        return None
    q, k = nodes[scores].inputs
    # Value 0 is the block's input, which has no node. Torch's fused attention needs equal branches,
    # its heads, and no operand that is scores itself (width None).
    branches = {nodes[value].branches if value else 1 for value in (q, k, v)}
    widths = [nodes[value].width if value else 1 for value in (q, k, v)]
    if len(branches) > 1 or None in widths:
        return None
    return Node("ATTEND", (q, k, v), product.width, product.branches, factor)


def _squared_relu(nodes: dict[int, Node], uses: Counter[int], square: Node) -> Node | None:
    (maximum,) = square.inputs
    if not _is(nodes, maximum, "MAX") or uses[maximum] > 1 or nodes[maximum].argument != 0:
        return None
    return Node("SQUARED_RELU", nodes[maximum].inputs, square.width, square.branches)


def _is(nodes: dict[int, Node], value: int, op: str) -> bool:
    return value > 0 and nodes[value].op == op


def _without_dead(program: Program, nodes: dict[int, Node]) -> Program:
    # Nodes are in order, so one pass from the output back marks all that it needs.
    needed = {len(nodes)}
    for number in reversed(nodes):
        if number in needed:
            needed.update(nodes[number].inputs)
    numbers = {0: 0}
    kept: list[Node] = []
    for number, node in nodes.items():
        if number in needed:
            inputs = tuple(numbers[value] for value in node.inputs)
            kept.append(Node(node.op, inputs, node.width, node.branches, node.argument, node.shape))
            numbers[number] = len(kept)
    return Program(program.width, tuple(kept))
