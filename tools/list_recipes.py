"""Print the paper's runs as Markdown tables, as printed there and as planned here: tools/list_recipes.py [--write]"""

from __future__ import annotations

import sys
from pathlib import Path

# Run from a source tree, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import run
from megatron.flags import Parser, some_path
from megatron.model.recipe_tables import recipe_tables, write_tables

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def main() -> None:
    """Plan every run, then print the tables or write them."""
    parser = Parser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the tables into DIR/README.md, print nothing")
    parser.add_argument("--recipes", type=some_path, default=RECIPES, metavar="DIR", help="recipes and their paper.csv")
    arguments = parser.parse_args()
    tables = recipe_tables(arguments.recipes)
    if arguments.write:
        write_tables(arguments.recipes / "README.md", tables)
    else:
        print("\n\n".join(f"{section}\n\n{table}" for section, table in tables.items()))


if __name__ == "__main__":
    run(main)
