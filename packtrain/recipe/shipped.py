"""The recipes and launch files that come with packtrain, found by name from any folder.

    find_shipped("quickstart", "recipes")      a file in the current folder wins, then recipes/ there, then packtrain's own
    find_shipped("zero2", "launch")

In a checkout they lie next to the package, in the wheel inside of it (`packtrain/share/`).
"""

from __future__ import annotations

from pathlib import Path

from packtrain.errors import PacktrainError, RecipeError
from packtrain.recipe.fields import did_you_mean

PACKAGE = Path(__file__).parents[1]
SHARE = next((place for place in (PACKAGE / "share", PACKAGE.parent) if (place / "launch").is_dir()), PACKAGE / "share")


def find_shipped(name: str | Path, folder: str, *, kind: str, below: str = "") -> Path:
    """Finds a YAML file by path or by name.

    Args:
        folder: "recipes" or "launch".
        kind: what messages call it.
        below: a folder in `folder` whose files have names, too (`compare`).

    Raises:
        PacktrainError: there is none; names the nearest one, a file next to it first, or all.
    """
    given, path = str(name), Path(name)
    if path.is_file():
        return path
    bare = given.removesuffix(".yaml")
    folders = [place for root in (Path.cwd(), SHARE) for place in (root / folder / below, root / folder)]
    for candidate in (Path(f"{given}.yaml"), *(place / f"{bare}.yaml" for place in folders)):
        if candidate.is_file():
            return candidate
    known = sorted({file.stem for place in folders for file in place.glob("*.yaml")})
    beside = {file.stem: str(file) for file in path.parent.glob("*.yaml")}
    near = beside.get(did_you_mean(path.stem, beside) or "") or did_you_mean(path.stem, known)
    fix = f"did you mean {near}?" if near else f"give a path, or one of {', '.join(known)}"
    raise PacktrainError(f"there is no such {kind}", value=given, fix=fix)


def find_recipe(name: str | Path, *, below: str = "") -> Path:
    """Finds a recipe by path or by name, in `recipes/` and in its folder `below`.

    Raises:
        RecipeError: there is none.
    """
    if Path(name).exists():  # a directory: reading it says so
        return Path(name)
    try:
        return find_shipped(name, "recipes", kind="recipe", below=below)
    except PacktrainError as error:
        raise RecipeError([error]) from None
