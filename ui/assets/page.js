// The API key stays in this tab: it is kept in sessionStorage and travels only as the Authorization
// header of the page's own events. The server reads it there and never holds it.
(() => {
  const plainFetch = window.fetch;
  window.fetch = (input, init = {}) => {
    const key = sessionStorage.getItem("herd-api-key");
    if (key && String(input.url ?? input).includes("/gradio_api/queue/join")) {
      const headers = new Headers(init.headers);
      headers.set("Authorization", "Bearer " + encodeURI(key));
      init = { ...init, headers };
    }
    return plainFetch(input, init);
  };
  window.herdKeepKey = (key) => sessionStorage.setItem("herd-api-key", key.trim());
})();
