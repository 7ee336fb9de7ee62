"""The OpenAPI description against the service: schemathesis finds no request that breaks it."""

from collections import Counter

import pytest
import schemathesis
from helpers.services import running
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


def statuses_of(service, examples):
    """Asks what schemathesis makes of each operation, right and wrong; how often each status."""
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    statuses = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        counted = statuses[operation.label] = Counter()
        modes = [GenerationMode.POSITIVE]
        if "{" in operation.path or operation.body:
            modes.append(GenerationMode.NEGATIVE)
        for mode in modes:
            ask_many(operation, mode, examples, counted)
    return statuses


def ask_many(operation, mode, examples, counted):
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(mode))
    def one(case):
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        counted[response.status_code] += 1

    one()


OPERATIONS = {
    "POST /v1/influence",
    "DELETE /v1/influence/{job_id}",
    "GET /v1/influence/{job_id}",
    "GET /v1/influence/{job_id}/report",
    "POST /v1/complete",
    "GET /v1/sequences/{index}",
    "GET /v1/info",
    "GET /healthz",
    "GET /metrics",
}


def test_no_request_of_the_description_breaks_the_service():
    with running() as service:
        statuses = statuses_of(service, 8)
        assert service.errors == []
    assert set(statuses) == OPERATIONS
    assert statuses["POST /v1/influence"][422] > 0
    assert statuses["GET /v1/info"][200] > 0


@pytest.mark.slow
def test_no_request_of_many_breaks_the_service():
    with running() as service:
        statuses = statuses_of(service, 500)
        assert service.errors == []
    assert set(statuses) == OPERATIONS
    assert statuses["POST /v1/influence"][200] > 0
    assert not any(status >= 500 for counted in statuses.values() for status in counted)
