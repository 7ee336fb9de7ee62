"""The page at `/docs`: the operations of the service, from its OpenAPI description.

Made here as plain HTML, since what usually shows such a description comes from the network.
"""

import html
import json
from collections.abc import Iterator, Mapping
from typing import Any

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Operations of ekfac-dist</title></head><body>
"""


def operations_page(description: Mapping[str, Any]) -> str:
    """An OpenAPI description as a page of HTML.

    Args:
        description: The description.
    """
    return "".join((_HEAD, *_parts(description), "</body></html>\n"))


def _parts(description: Mapping[str, Any]) -> Iterator[str]:
    info, schemas = description["info"], description.get("components", {}).get("schemas", {})
    yield f"<h1>{_text(info['title'])} {_text(info['version'])}</h1>"
    yield f"<p>{_text(info.get('description', ''))}</p>"
    yield '<p>Also as <a href="/openapi.json">OpenAPI</a>.</p>'
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            yield f"<h2>{_text(method.upper())} <code>{_text(path)}</code></h2>"
            yield f"<p>{_text(operation.get('description') or operation.get('summary', ''))}</p>"
            yield from _request(operation, schemas)
            yield "<ul>"
            for status, response in operation["responses"].items():
                yield f"<li>{_text(status)}: {_text(response['description'])}</li>"
            yield "</ul>"
    for name, schema in schemas.items():
        if "properties" not in schema:
            continue
        yield f'<h2 id="{_text(name)}">{_text(name)}</h2>'
        yield f"<p>{_text(schema.get('description', ''))}</p>"
        yield from _table(schema)


def _request(operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    """A table of the fields of an operation's body."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return
    yield from _table(schemas[content["schema"]["$ref"].rpartition("/")[2]])


def _table(schema: Mapping[str, Any]) -> Iterator[str]:
    """A table of an object's fields."""
    yield "<table><tr><th>field</th><th>type</th><th>default</th><th>meaning</th></tr>"
    for name, field in schema["properties"].items():
        cells = (name, _type(field), json.dumps(field.get("default")), field.get("description", ""))
        yield "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"
    yield "</table>"


def _type(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(one) for one in field["anyOf"])
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    return str(field.get("type", "anything"))


def _text(value: Any) -> str:
    return html.escape(str(value))
