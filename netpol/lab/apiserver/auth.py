"""Who is asking: bearer tokens and the users they stand for.

Owns the token table and tokens of ServiceAccounts. What a user may do is decided in `rbac.py`.
"""

import secrets
from dataclasses import dataclass

from netpol.lab.apiserver import errors
from netpol.lab.apiserver.faults import Faults

MASTERS = "system:masters"
AUTHENTICATED = "system:authenticated"


@dataclass(frozen=True, slots=True)
class User:
    """A name and the groups it is in."""

    name: str
    groups: frozenset[str]


ADMIN = User("kubernetes-admin", frozenset({MASTERS, AUTHENTICATED}))
ANONYMOUS = User("system:anonymous", frozenset({"system:unauthenticated"}))


def service_account(namespace: str, name: str) -> User:
    """Return the user that a ServiceAccount is."""
    groups = {"system:serviceaccounts", f"system:serviceaccounts:{namespace}", AUTHENTICATED}
    return User(f"system:serviceaccount:{namespace}:{name}", frozenset(groups))


def named_user(name: str, groups: list[str]) -> User:
    """Return a user by name; that of a ServiceAccount is in its groups."""
    match name.split(":"):
        case ["system", "serviceaccount", namespace, account] if not groups:
            return service_account(namespace, account)
        case _:
            return User(name, frozenset({*groups, AUTHENTICATED}))


class Authenticator:
    """The known tokens.

    Args:
        tokens: Tokens and their users; None lets everybody who shows no token in as the admin.
        faults: May narrow the accepted tokens.
    """

    def __init__(self, tokens: dict[str, User] | None, faults: Faults) -> None:
        self._open = tokens is None
        self._tokens = dict(tokens or {})
        self._faults = faults

    def mint(self, namespace: str, name: str) -> str:
        """Return a new token of a ServiceAccount."""
        token = f"sa-{secrets.token_urlsafe(24)}"
        self._tokens[token] = service_account(namespace, name)
        return token

    def user(self, authorization: str) -> User:
        """Return the user of an Authorization header.

        Raises:
            ApiError: 401 for a token that is unknown or no longer accepted.
        """
        accepted = self._faults.accepted_tokens
        if not authorization:
            if self._open and accepted is None:
                return ADMIN
            return ANONYMOUS
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        found = self._tokens.get(token)
        if accepted is not None and token not in accepted:
            self._faults.hits["accepted_tokens"] += 1
            found = None
        elif accepted is not None and found is None and self._open:
            found = ADMIN
        if found is None or scheme.lower() != "bearer":
            raise errors.unauthorized()
        return found
