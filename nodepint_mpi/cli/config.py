"""`nodepint config`: the configs that come with the package."""

from pathlib import Path

import click


@click.command()
@click.argument("name", required=False)
@click.option("--copy", is_flag=True, help="Copy it, and the code and recipe it names, to here.")
def config(name: str | None, copy: bool) -> None:
    """Print the config NAME that comes with nodepint_mpi, or the names of all."""
    from nodepint_mpi.data.shipped import config_names, copy_config, find_config

    if name is None:
        click.echo("\n".join(config_names()))
    elif copy:
        for path in copy_config(name, Path()):
            click.echo(path)
    else:
        click.echo(find_config(name).read_text(encoding="utf-8"), nl=False)
