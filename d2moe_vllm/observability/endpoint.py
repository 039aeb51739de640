"""The endpoint plugin: `GET /v1/d2moe/info` and the page `GET /v1/d2moe`, behind the server's API key."""

from __future__ import annotations

from argparse import Namespace
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse

from d2moe_vllm import compat
from d2moe_vllm.format.config import MANIFEST_FILE, QUANT_METHOD
from d2moe_vllm.observability import files
from d2moe_vllm.observability.info import Info, counters, describe
from d2moe_vllm.overrides import backend_in_force, scope_in_force

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

RESPONSES: dict[int | str, dict[str, Any]] = {
    401: {"description": "The server has an API key, and the request has none or another one."},
    404: {"description": "The served model is no d2moe checkpoint."},
}
router = APIRouter(prefix="/v1/d2moe", tags=["d2moe"], responses=RESPONSES)

HEADERS = {
    "Cache-Control": "no-store",
    # What is in the page, and its own origin; a saved copy reads from the server it is told.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Endpoint:
    """What `vllm.endpoint_plugins` asks for; vLLM loads it only if VLLM_PLUGINS names d2moe."""

    name = "d2moe"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: EngineClient | None, state: Any, args: Namespace) -> None:
        """engine_client: None on the render server, which serves no model."""
        state.d2moe = None
        quantization = engine_client.vllm_config.quant_config if engine_client else None
        if engine_client and quantization is not None and quantization.get_name() == QUANT_METHOD:
            state.d2moe = Checkpoint(quantization, compat.served(engine_client.vllm_config))


class Checkpoint:
    """The served checkpoint as the front-end knows it. quantization: vLLM's, a serving.quantization.D2MoEConfig."""

    def __init__(self, quantization: Any, served: compat.Served) -> None:
        self._folder = quantization.metrics_folder
        self._info = describe(
            quantization.config,
            model=served.name,
            folder=_checkpoint_folder(served),
            scope=scope_in_force(quantization.config, served.additional_config),
            backend=backend_in_force(served.additional_config, compat.device_type())[0],
            tp_size=served.tensor_parallel_size,
            ep_size=served.expert_parallel_size,
        )

    def info(self) -> Info:
        families = files.collect(self._folder) if self._folder else []
        return self._info.model_copy(update={"counters": counters(families)})


def _checkpoint_folder(served: compat.Served) -> Path | None:
    """Of a path, or of a Hub id whose files have been downloaded."""
    if Path(served.model).is_dir():
        return Path(served.model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(
            served.model, MANIFEST_FILE, cache_dir=served.download_dir, revision=served.revision
        )
    except HFValidationError:  # neither: sizes are not known here
        return None
    return Path(found).parent if isinstance(found, str) else None


def _checkpoint(request: Request) -> Checkpoint:
    checkpoint = getattr(request.app.state, "d2moe", None)
    if checkpoint is None:
        raise HTTPException(404, "the served model is no d2moe checkpoint: there is nothing to show")
    return checkpoint


@router.get("/info")
def info(request: Request) -> Info:
    return _checkpoint(request).info()


@router.get("", response_class=HTMLResponse)
def page(request: Request) -> HTMLResponse:
    """The page with today's figures in it, so that a saved copy shows them too."""
    figures = _checkpoint(request).info().model_dump_json().replace("<", "\\u003c")
    html = package_files("d2moe_vllm.observability").joinpath("page.html").read_text(encoding="utf-8")
    return HTMLResponse(html.replace("{{ info }}", figures), headers=HEADERS)
