-- When the running attempt must have ended. Its dispatcher sees to that; the column is for the sweep, should that be dead.

ALTER TABLE jobs ADD COLUMN run_by timestamptz;
