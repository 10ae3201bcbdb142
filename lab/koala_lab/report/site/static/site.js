// Browsers refuse to fetch pages beside a page that was opened from a file, so search shows titles only there.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

// A figure of several panels keeps a size that can be read, scrolls by itself, and opens alone where it is clicked.
document.addEventListener("DOMContentLoaded", () => {
  for (const image of document.querySelectorAll(".cell_output img")) {
    const link = document.createElement("a");
    link.href = image.src;
    link.title = "the picture alone";
    image.replaceWith(link);
    link.append(image);
    const judge = () => image.classList.toggle("wide", image.naturalWidth > 700);
    if (image.complete) judge();
    else image.addEventListener("load", judge);
  }
});
