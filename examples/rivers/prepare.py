"""`python -m examples.rivers.prepare FOLDER`: write `catchments.parquet` from R files.

FOLDER holds the `data/*.rda` of the package airGRdatasets 0.2.3. Needs: pip install rdata==1.1.0.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import polars as pl

from examples.rivers.data import TABLE

COLUMNS = {
    "precipitation": "Ptot",
    "temperature": "Temp",
    "evapotranspiration": "Evap",
    "discharge": "Qmmd",
}
"""By column, its name in the package; millimetres a day, and degrees Celsius."""


def main() -> None:
    """Read every catchment, write the table."""
    parser = argparse.ArgumentParser(prog="python -m examples.rivers.prepare", description=__doc__)
    parser.add_argument("folder", type=Path)
    files = sorted(parser.parse_args().folder.glob("*.rda"))
    table = pl.concat([catchment(file) for file in files])
    table.write_parquet(TABLE, compression="zstd", compression_level=22)
    print(f"{TABLE}: {len(files)} catchments, {table.height} days, {TABLE.stat().st_size} bytes")


def catchment(file: Path) -> pl.DataFrame:
    """The days of one catchment; `discharge` is null where the gauge has none."""
    import rdata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes of R that rdata reads as plain lists
        ((code, recorded),) = rdata.read_rda(file).items()
    series = recorded["TS"]
    return pl.DataFrame(
        {
            "catchment": [str(code)] * len(series),
            "day": pl.Series(series["Date"].to_numpy("int64") * 1000).cast(
                pl.Datetime("ms", "UTC")
            ),
            **{name: series[theirs].to_numpy("float64") for name, theirs in COLUMNS.items()},
        }
    ).with_columns(pl.col("discharge").fill_nan(None))


if __name__ == "__main__":
    main()
