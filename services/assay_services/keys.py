"""`python -m assay_services.keys`: what `assay keys` becomes."""

import argparse
import sys

from assay_platform.config import load_config

from assay_services.auth import KeyStore
from assay_services.exits import exit_code


def main() -> int:
    """Make, list or revoke; returns the exit code."""
    parser = argparse.ArgumentParser(prog="assay keys")
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new")
    new.add_argument("who")
    new.add_argument("--scopes", default="score,write,read")
    new.add_argument("--rate", type=float)
    new.add_argument("--days", type=float)
    new.add_argument("--models")
    commands.add_parser("list")
    commands.add_parser("revoke").add_argument("id")
    call = parser.parse_args()
    return exit_code(lambda: _run(call))


def _run(call: argparse.Namespace) -> None:
    store = KeyStore(load_config().paths.api_keys)
    if call.command == "new":
        scopes = [scope.strip() for scope in call.scopes.split(",") if scope.strip()]
        models = None if call.models is None else [name.strip() for name in call.models.split(",") if name.strip()]
        key = store.create(call.who, scopes=scopes, rate=call.rate, days=call.days, models=models)
        sys.stdout.write(f"{key}\n")
        sys.stderr.write(f"key for {call.who!r}: it is not shown again\n")
    elif call.command == "revoke":
        gone = store.revoke(call.id)
        sys.stdout.write(f"the key {gone.id} of {gone.who!r} is revoked\n")
    else:
        _show(store)


def _show(store: KeyStore) -> None:
    callers = store.callers()
    if not callers:
        sys.stdout.write("there is no key: the service answers on loopback alone; `assay keys new WHO` makes one\n")
        return
    sys.stdout.write(f"{'id':<10}{'who':<24}{'may':<26}{'a second':<10}{'made':<27}expires\n")
    for one in callers:
        rate = "" if one.rate is None else f"{one.rate:g}"
        may = ",".join(one.scopes) + ("" if one.models is None else f" of {','.join(one.models)}")
        sys.stdout.write(f"{one.id:<10}{one.who:<24}{may:<26}{rate:<10}{one.created:<27}{one.expires or 'never'}\n")


if __name__ == "__main__":
    sys.exit(main())
