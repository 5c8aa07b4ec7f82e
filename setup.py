"""What pyproject.toml cannot say: the wheel holds the commit that it was built from (`moonlight --version`)."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithCommit(build_py):
    def run(self) -> None:
        super().run()
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        found = subprocess.run(git, capture_output=True, text=True, check=False)
        if found.returncode == 0 and not self.editable_mode:
            (Path(self.build_lib) / "jobs" / "COMMIT").write_text(found.stdout)


setup(cmdclass={"build_py": WithCommit})
