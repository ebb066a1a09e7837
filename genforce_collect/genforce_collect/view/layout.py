"""Which panels the live view opens with."""

from __future__ import annotations

import rerun.blueprint as rrb

from genforce_collect.config import SensorConfig

TIMELINE = "time"
SHOWN_S = 15.0  # of the plots, up to the time that is looked at


def layout(sensor: SensorConfig) -> rrb.Blueprint:
    """Camera, cell and state above; forces and tip in the middle; phases, rates, events below."""
    width, height = sensor.segmentation.frame_width, sensor.segmentation.frame_height
    recent = rrb.VisibleTimeRanges(
        timeline=TIMELINE,
        start=rrb.TimeRangeBoundary.cursor_relative(seconds=-SHOWN_S),
        end=rrb.TimeRangeBoundary.cursor_relative(),
    )

    def plot(origin: str, name: str) -> rrb.TimeSeriesView:
        return rrb.TimeSeriesView(
            origin=origin,
            name=name,
            time_ranges=recent,
            plot_legend=rrb.PlotLegend(corner=rrb.Corner2D.LeftTop),
        )

    return rrb.Blueprint(
        rrb.Vertical(
            rrb.Horizontal(
                rrb.Spatial2DView(
                    origin="camera",
                    name=f"{sensor.name}: markers and displacement",
                    visual_bounds=rrb.VisualBounds2D(x_range=[0, width], y_range=[0, height]),
                ),
                rrb.Spatial3DView(origin="cell", name="tip over the gel (mm)"),
                rrb.TextDocumentView(origin="state", name="state"),
                column_shares=[3, 2, 2],
            ),
            rrb.Horizontal(
                plot("force/x", "Fx (N)"),
                plot("force/y", "Fy (N)"),
                plot("force/z", "Fz (N)"),
                plot("tip", "tip (mm)"),
            ),
            rrb.Horizontal(
                rrb.StateTimelineView(origin="states", name="phase and health", time_ranges=recent),
                plot("rate", "rates (Hz)"),
                rrb.TextLogView(origin="events", name="events"),
            ),
            row_shares=[9, 6, 7],
        ),
        rrb.TimePanel(timeline=TIMELINE, play_state="following", state="collapsed"),
        rrb.TopPanel(state="hidden"),  # speaks of the viewer, not of the cell
        rrb.BlueprintPanel(state="hidden"),
        rrb.SelectionPanel(state="hidden"),
        auto_views=False,
        auto_layout=False,
    )
