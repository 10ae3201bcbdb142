// Browsers refuse to fetch pages beside a page that was opened from a file, so search shows titles only there.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
