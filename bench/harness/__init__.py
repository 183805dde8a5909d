"""Tools that scenarios and contenders share: servers, processes, meters, reports and cards."""
