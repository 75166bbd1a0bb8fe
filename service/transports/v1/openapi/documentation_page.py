"""The page `/docs`: Swagger UI for `/openapi.json`, which asks for an access key if one is needed.

The key is kept as the console keeps it, in the `sessionStorage` of the tab: it is entered once for
both pages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

ASSETS: Final = "/docs/assets"

_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Carry: HTTP API</title>
<link rel="stylesheet" href=".ASSETS/swagger-ui.css">
<link rel="icon" href=".ASSETS/favicon.png">
<style>
#access { font: 16px system-ui, sans-serif; margin: 2rem auto; max-width: 40rem; }
</style>
</head>
<body>
<form id="access" hidden>
<p role="alert"></p>
<label>Access key <input type="password" autocomplete="off" required size="50"></label>
<button>Open</button>
</form>
<div id="swagger-ui"></div>
<script src=".ASSETS/swagger-ui-bundle.js"></script>
<script>
const STORED_KEY = "carry.access-key";
const form = document.querySelector("#access");
const input = form.querySelector("input");

async function open() {
  const key = sessionStorage.getItem(STORED_KEY);
  const headers = key === null ? {} : { authorization: `Bearer ${key}` };
  const response = await fetch("./openapi.json", { headers, cache: "no-store" });
  const body = await response.json();
  form.hidden = response.ok;
  if (response.ok) {
    const ui = SwaggerUIBundle({
      ...PARAMETERS,
      spec: body,
      presets: [SwaggerUIBundle.presets.apis, SwaggerUIBundle.SwaggerUIStandalonePreset],
      onComplete: () => key !== null && ui.preauthorizeApiKey("access_key", key),
    });
    return;
  }
  sessionStorage.removeItem(STORED_KEY);
  const isFirst = response.status === 401 && key === null;
  form.querySelector("p").textContent = isFirst ? "An access key is needed." : body.detail;
  input.focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(STORED_KEY, input.value.trim());
  input.value = "";
  open();
});
open();
</script>
</body>
</html>
"""


def documentation_html(parameters: Mapping[str, Any]) -> str:
    """The page; its addresses are relative, so that a proxy may serve it below a path.

    Args:
        parameters: of Swagger UI, besides those that all pages have.
    """
    shown = {
        "dom_id": "#swagger-ui",
        "layout": "BaseLayout",
        "deepLinking": True,
        "showExtensions": True,
        "showCommonExtensions": True,
        **parameters,
    }
    return _PAGE.replace("ASSETS", ASSETS).replace("PARAMETERS", json.dumps(shown))
