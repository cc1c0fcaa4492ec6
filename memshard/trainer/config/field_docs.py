"""Read the docstrings of a dataclass's fields."""

import ast
import inspect
import textwrap
from itertools import pairwise


def field_docs(cls: type) -> dict[str, str]:
    """Return the string literal under each field, which Python itself does not keep."""
    # From the source: a string below a field is an expression, which Python drops.
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for item, after in pairwise(tree.body):
        if (
            isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and isinstance(after, ast.Expr)
        ):
            docs[item.target.id] = " ".join(ast.literal_eval(after.value).split())
    return docs
