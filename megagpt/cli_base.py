"""What every file of the command tree uses: groups that tell user errors in one message, commands with examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from megagpt.errors import MegaGPTError


class Commands(click.Group):
    """A command group whose user errors are one message and an exit code, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what the user did wrong ends it with its own exit code."""
        try:
            return super().invoke(ctx)
        except MegaGPTError as error:
            click.secho(f"error: {error}", fg="red", err=True)
            ctx.exit(error.exit_code)


class Examples(click.Command):
    """A command whose epilog (examples) keeps its line breaks."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        """Write the examples as they stand."""
        if self.epilog:
            formatter.write_paragraph()
            formatter.write(self.epilog.strip("\n") + "\n")


def configs_folder() -> Path:
    """configs/ of the checkout that this file is part of, or of the working directory for an installed package."""
    beside = Path(__file__).resolve().parent.parent / "configs"
    return beside if beside.is_dir() else Path("configs")


def examples(*lines: str) -> dict[str, Any]:
    """Arguments of `command` that show these lines at the end of its help."""
    return {"cls": Examples, "epilog": "\n".join(["Examples:", *(f"  {line}" for line in lines)])}


PATH = click.Path(path_type=Path)
WITH_EXTRA_WORDS = {"ignore_unknown_options": True}
