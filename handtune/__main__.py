"""`python -m handtune`, and the installed `handtune`, are the command line in a process of its own."""

from .terminal import begin_process

begin_process()  # before anything else is imported: Ctrl-C may come at any moment

from .cli import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
