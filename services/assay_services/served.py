"""What a process answers: the models that it follows, and those that requests name."""

import logging
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

from assay_services.app import application
from assay_services.dependencies import Answers, Dependencies
from assay_services.fast_path import APPLICATIONS
from assay_services.hot_swap import Slot
from assay_services.problems import ProblemError
from assay_services.replies import Reply, refusal
from assay_services.siblings import HandOver
from assay_services.tenants import BEING_READ, ByModel, Tenant, Tenants

_log = logging.getLogger("assay.service")


class Served:
    """Applications and answers by the name of a model. followed: the application of those that are followed. most:
    others in memory at once.
    """

    def __init__(self, deps: Dependencies) -> None:
        self._deps = deps
        self._answers = deps.by_lane()
        self.most = deps.config.service.max_models
        self.tenants = Tenants(self._read, self._let_go, most=self.most)
        self.followed = application(deps)
        # By name: views of those that are followed, and of others that were in memory once.
        self._by_name: dict[str, Tenant] = {}
        self._known: dict[str, Tenant] = {}

    def app(self) -> Any:
        """ASGI, for one event loop: the client of other processes in it belongs to one."""
        return HandOver(ByModel(self.followed, self.get), siblings=self._deps.siblings)

    def start(self) -> None:
        """See `Dependencies`."""
        self._deps.start(self.app())

    def stop(self) -> None:
        """See `Dependencies`."""
        self.tenants.close()
        self._deps.stop()

    def by_lane(self) -> dict[str, Answers]:
        """What answers the bodies of each queue; their shape says which model they name."""
        return {lane: partial(self._answered, lane) for lane in self._answers}

    def get(self, name: str) -> Tenant | None:
        """A model in memory; None while it is being read.

        Raises:
            ProblemError: there is no such model.
        """
        return self.among_followed(name) or self.tenants.get(name)

    def among_followed(self, name: str) -> Tenant | None:
        """One that answers without a name, too, by itself."""
        for slot in (self._deps.fraud, self._deps.recommend):
            if slot.current is not None and slot.current.name == name:
                if name not in self._by_name:
                    self._by_name[name] = self._alone(slot)
                return self._by_name[name]
        return None

    def _answered(self, lane: str, shape: Hashable, bodies: Sequence[bytes]) -> list[Reply]:
        assert isinstance(shape, tuple)
        name, wanted = shape
        if not name:
            return self._answers[lane](wanted, bodies)
        try:
            tenant = self.get(name)
        except ProblemError as error:
            return [refusal(error)] * len(bodies)
        if tenant is None:
            return [BEING_READ] * len(bodies)
        if tenant.slot.application != APPLICATIONS[lane]:
            detail = f"model {name!r} is a {tenant.slot.application} model; it does not answer this"
            return [refusal(ProblemError(404, detail))] * len(bodies)
        return tenant.deps.by_lane()[lane](wanted, bodies)

    def _read(self, name: str) -> Tenant:
        registry = self._deps.open_registry()
        kind = registry.application_of(name)
        if kind is None:
            raise ProblemError(404, f"no model is named {name!r}; /v1/registry has those that there are")
        # FastAPI keeps what an application refers to for ever, so there is one a model, and only its slot is emptied.
        tenant = self._known.get(name)
        if tenant is None:
            tenant = self._known[name] = self._alone(self._deps.open_slot(kind, ""))
        tenant.slot.follow(name)
        tenant.slot.refresh(registry)
        if tenant.slot.current is None:
            tenant.slot.let_go()
            detail = f"model {name!r} has no champion that can be read; `assay promote` makes one"
            raise ProblemError(503, detail, headers={"Retry-After": "5"})
        self._deps.slots.append(tenant.slot)
        return tenant

    def _alone(self, slot: Slot[Any]) -> Tenant:
        own = self._deps.for_model(slot)
        return Tenant(slot, own, application(own))

    def _let_go(self, tenant: Tenant) -> None:
        self._deps.slots.remove(tenant.slot)
        name = tenant.slot.let_go()
        self._deps.metrics.forget_drift(name)
        _log.info("%s was not asked for longest and goes from memory", name)
