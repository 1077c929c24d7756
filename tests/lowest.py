"""The lowest versions that pyproject.toml allows, as a file of requirements: `python tests/lowest.py > FILE`."""

import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

if __name__ == "__main__":
    extras = PROJECT["optional-dependencies"]
    for requirement in (*PROJECT["dependencies"], *extras["plot"], *extras["images"], *extras["rouge"]):
        print(requirement.replace(">=", "=="))
