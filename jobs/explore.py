"""Look at the published lists in a browser: `python -m jobs.explore --config demo`. Serves this machine only; needs no Spark."""

import argparse
import socket
from collections.abc import Sequence

from conf.errors import MachineError
from jobs.arguments import add_config, report_errors, settings_of


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="a page on this machine that shows the published lists")
    add_config(parser, default="demo")

    def run() -> None:
        values = parser.parse_args(argv)
        settings = settings_of(values)
        check_port(settings.explorer.port)
        import uvicorn  # these three take most of the start; `--help` and a wrong setting should not wait for them

        from jobs.explorer.app import HOSTS, Explorer, make_app

        explorer = Explorer(settings=settings)
        night = explorer.night()
        print(f"lists of {night.run_date} ({night.catalog.num_items:,} items): http://{HOSTS[0]}:{settings.explorer.port}/   Ctrl-C ends")
        uvicorn.run(make_app(explorer), host=HOSTS[0], port=settings.explorer.port, log_level="warning")

    report_errors(run)


def check_port(port: int) -> None:
    """Raise MachineError if something else listens on this port of loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            advice = "end the other program, or choose another port with --set explorer.port=8766"
            raise MachineError(f"port {port} of 127.0.0.1 cannot be used: {error.strerror}; {advice}") from error


if __name__ == "__main__":
    main()
