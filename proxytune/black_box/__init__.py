"""A base behind an API: only its most probable tokens are seen, and the experts that steer it run here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.black_box.client import ApiClient
    from proxytune.black_box.decoder import BlackBoxDecoder
    from proxytune.black_box.forecasting import Forecast, forecast
    from proxytune.black_box.probing import probe

__all__ = ["ApiClient", "BlackBoxDecoder", "Forecast", "forecast", "probe"]

__getattr__ = door(
    __name__,
    {
        "ApiClient": "client",
        "BlackBoxDecoder": "decoder",
        "Forecast": "forecasting",
        "forecast": "forecasting",
        "probe": "probing",
    },
)
